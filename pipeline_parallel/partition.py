"""Cut L layers into S stages. Pure: ranges of layers in, ranges of layers out; every layer is covered, every stage gets one."""

import itertools

from user_error import UserError

Cut = tuple[tuple[int, int], ...]  # stage s holds layers [first, last)


def even_cut(num_layers: int, num_stages: int) -> Cut:
    """Stages that differ by one layer at most; the longer ones come first, because the last stage also has the head.

    Raises UserError when there are more stages than layers.
    """
    if num_stages > num_layers:
        raise UserError(
            f"every stage needs a layer: --pipeline-group-size is {num_stages} and the model has {num_layers} layers. "
            f"Use --pipeline-group-size {num_layers} or less"
        )
    base, longer = divmod(num_layers, num_stages)
    bounds = [s * base + min(s, longer) for s in range(num_stages + 1)]
    return tuple(itertools.pairwise(bounds))


def cut_by_num_layers(num_layers: int, num_stages: int, layers_per_stage: int) -> Cut:
    """Stage s holds [s*N, min((s+1)*N, L)), as --num-layers N of the relatives means it.

    Raises UserError unless every layer is covered and every stage gets one; they would train a truncated model without a word.
    """
    fitting = f"Leave --num-layers out for an even cut, or use {-(-num_layers // num_stages)}"
    if layers_per_stage < 1:
        raise UserError(f"--num-layers must be at least 1; it is {layers_per_stage}. {fitting}")
    if layers_per_stage * num_stages < num_layers:
        raise UserError(
            f"--num-layers x --pipeline-group-size must cover the model: {layers_per_stage} x {num_stages} = "
            f"{layers_per_stage * num_stages} "
            f"of its {num_layers} layers. {fitting}"
        )
    if layers_per_stage * (num_stages - 1) >= num_layers:
        raise UserError(
            f"every stage needs a layer: with --num-layers {layers_per_stage} stage {num_stages - 1} of {num_stages} would get none of the "
            f"model's {num_layers} layers. {fitting}"
        )
    return tuple((s * layers_per_stage, min((s + 1) * layers_per_stage, num_layers)) for s in range(num_stages))
