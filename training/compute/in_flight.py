"""How many micro-batches are on their way at once, as the flags have it."""

from pipeline_parallel.schedule import PipelineMode, order
from pipeline_parallel.simulator import peak_in_flight
from training.config.train import Config


def asked_extra_warmup(config: Config) -> tuple[int, ...]:
    """By link; what the flag says, 0 for auto."""
    return (min(config.extra_warmup or 0, num_micro_batches(config)),) * (config.num_stages - 1)


def num_micro_batches(config: Config) -> int:
    """Of an optimizer step: nobody can run more of them ahead."""
    return config.gradient_accumulate_step * config.batch_size // config.micro_batch_size


def in_flight_of(config: Config, extra_warmup: tuple[int, ...]) -> tuple[int, ...]:
    """By stage, the most micro-batches whose activations it holds; extra_warmup: by link."""

    def of_stage(stage: int, mode: PipelineMode) -> int:
        actions = order(
            mode,
            stage=stage,
            num_stages=config.num_stages,
            num_micro_batches=config.batch_size // config.micro_batch_size,
            num_accumulation_steps=config.gradient_accumulate_step,
            extra_warmup=extra_warmup,
        )
        return peak_in_flight(actions)

    return tuple(of_stage(stage, config.pp_mode) for stage in range(config.num_stages))
