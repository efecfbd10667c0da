"""What travels between ranks: links, gradient buckets that overlap with the backward, interfaces, sockets on one address only."""

import os
import socket
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.ranks import example_tokens, run_ranks
from support.stages import load
from torch import nn

from comms.codecs import Codec, WireDtype, make_codec
from comms.groups import Groups, join_process_group, make_groups
from comms.interfaces import choose_interface, list_interfaces, select_for_transport
from comms.links import PeerLost, ProcessGroupLink, WireStats
from comms.place import place_of
from comms.probe import time_link
from comms.rendezvous import Door, check_door_is_here, listen
from comms.spans import Spans
from comms.transport import GlooTransport, Pending
from data_parallel.allreduce import ALIGNMENT_BYTES, GradientBuckets
from optim.decide import layer_square
from pipeline_parallel.schedule import PipelineMode
from training.compute.gradient import GlobalGradient, Schedule
from training.job.job import COLLECTIVE_TIMEOUT
from user_error import UserError


@pytest.mark.parametrize("mode", ["gpipe", "1f1b", "zb"])
def test_the_first_bucket_is_launched_while_the_last_backward_runs(model_folder: Path, tmp_path: Path, mode: PipelineMode) -> None:
    tokens, num_targets = example_tokens(8, 24, 320)

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=2, pp_size=1)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        spans = Spans(record=True)
        gradient = GlobalGradient(
            place=place,
            groups=make_groups(place, "gloo", COLLECTIVE_TIMEOUT),
            stage=load(model_folder),
            spans=spans,
            peer_names=["", ""],
            schedule=Schedule(mode=mode),
            batch_size=4,
            micro_batch_size=2,
            seq_length=24,
            clip_grad_norm=0,
        )
        gradient.compute(tokens.view(1, 2, 4, 3, 24)[:, rank], num_targets)
        backwards = [span for span in spans.recorded if span.name == "backward"]
        losses = [span for span in spans.recorded if span.name == "loss"]
        launches = [span for span in spans.recorded if span.name == "allreduce launched"]
        assert [span.micro_batch for span in backwards] == [0, 1]
        assert len(launches) == 6, "embeddings, four layers and head: a bucket never joins two"
        assert losses[-1].end <= launches[0].start < backwards[-1].end, "the first bucket starts inside the last backward"
        last_work = [span for span in spans.recorded if span.name in ("backward", "weight gradient")][-1]
        assert (last_work.name == "weight gradient") == (mode == "zb")
        assert launches[-2].start < last_work.end, "all but the embeddings' leave before the last gradient is added"

    run_ranks(rank_main, 2, tmp_path)


def test_buckets_never_join_layers_are_aligned_and_respect_their_size() -> None:
    layers = {f"layer_{n:02d}": [(f"p{m}", nn.Parameter(torch.randn(size))) for m, size in enumerate((7, 300, 1, 129))] for n in range(3)}
    buckets = GradientBuckets(iter(layers.items()), groups=(), spans=Spans(), bucket_bytes=1300)
    for key, flats in buckets.flat_gradients():
        gradients = [p.grad for _, p in layers[key]]
        assert len(flats) == 2 and all(flat.numel() * 4 <= 1300 + 4 * ALIGNMENT_BYTES for flat in flats)
        for gradient in gradients:
            assert gradient is not None and gradient.data_ptr() % ALIGNMENT_BYTES == 0
            assert any(flat.data_ptr() <= gradient.data_ptr() < flat.data_ptr() + flat.numel() * 4 for flat in flats)
    for parameters in layers.values():
        sum((p * p).sum() for _, p in parameters).backward()  # type: ignore[union-attr]
        for _, p in parameters:
            torch.testing.assert_close(p.grad, 2 * p.detach())
    squares = {key: layer_square(flats) for key, flats in buckets.flat_gradients()}
    for key, parameters in layers.items():
        assert squares[key] == pytest.approx(sum(float((2 * p.detach()).double().pow(2).sum()) for _, p in parameters), rel=1e-12)


def test_three_replicas_give_the_same_bits_at_every_cut(model_folder: Path, tmp_path: Path) -> None:
    """With three replicas a ring's order of summation depends on the place in the buffer; buckets per layer make that the same."""
    tokens, num_targets = example_tokens(6, 24, 320)

    def run(stages: int) -> dict[str, torch.Tensor]:
        def rank_main(rank: int, store: dist.Store) -> None:
            place = place_of(rank, dp_size=3, pp_size=stages)
            join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
            stage = load(model_folder, *((0, 4), (0, 2), (2, 4))[0 if stages == 1 else 1 + place.pp])
            gradient = GlobalGradient(
                place=place,
                groups=make_groups(place, "gloo", COLLECTIVE_TIMEOUT),
                stage=stage,
                spans=Spans(),
                peer_names=[""] * 6,
                schedule=Schedule(mode="gpipe"),
                batch_size=2,
                micro_batch_size=1,
                seq_length=24,
                clip_grad_norm=0.5,
            )
            gradient.compute(tokens.view(1, 3, 2, 3, 24)[:, place.dp], num_targets)
            if place.dp == 0:
                found = {name: p.grad.clone() for name, p in stage.named_parameters()}  # type: ignore[union-attr]
                save_file(found, tmp_path / f"{stages}_{place.pp}.safetensors")

        run_ranks(rank_main, 3 * stages, tmp_path)
        return {name: t for path in tmp_path.glob(f"{stages}_*.safetensors") for name, t in load_file(path).items()}

    one, two = run(1), run(2)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def make_link(groups: Groups, rank: int, codecs: tuple[Codec, Codec], *, depth: int, peer_in_words: str = "the other") -> ProcessGroupLink:
    """Between ranks 0 and 1. codecs: of activations, which rank 0 sends, and of gradients."""
    pair = groups.to_next or groups.to_previous
    assert pair is not None
    ways = (pair.activations, pair.gradients)
    transport = GlooTransport(send_group=ways[rank], recv_group=ways[1 - rank], peer=1 - rank, device=torch.device("cpu"))
    return ProcessGroupLink(
        transport=transport, send_codec=codecs[rank], recv_codec=codecs[1 - rank], peer_in_words=peer_in_words, depth=depth
    )


def pair_of_ranks(rank: int, store: dist.Store) -> Groups:
    place = place_of(rank, dp_size=1, pp_size=2)
    join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
    return make_groups(place, "gloo", COLLECTIVE_TIMEOUT)


def test_links_deliver_in_order_own_their_storage_and_reuse_few_buffers(tmp_path: Path) -> None:
    num_messages, depth = 9, 3

    def rank_main(rank: int, store: dist.Store) -> None:
        codec = make_codec("none", shape=(3, 5), dtype=torch.float32)
        link = make_link(pair_of_ranks(rank, store), rank, (codec, codec), depth=depth)
        for step in range(3):
            link.post(num_messages)
            for i in range(num_messages):
                link.put(i, torch.full((3, 5), 100.0 * step + 10 * rank + i))
            taken = [link.take(i) for i in range(num_messages)]
            link.flush()
            for i, message in enumerate(taken):
                assert torch.equal(message, torch.full((3, 5), 100.0 * step + 10 * (1 - rank) + i))
                assert message.data_ptr() % 64 == 0
            assert len({message.data_ptr() for message in taken}) == num_messages
            assert link.pop_stats() == WireStats(num_bytes=num_messages * 3 * 5 * 4)
        assert len(link._buffers) == depth
        link.close()

    run_ranks(rank_main, 2, tmp_path)


def test_a_link_knows_whether_the_next_message_is_here(tmp_path: Path) -> None:
    def rank_main(rank: int, store: dist.Store) -> None:
        codec = make_codec("none", shape=(4,), dtype=torch.float32)
        link = make_link(pair_of_ranks(rank, store), rank, (codec, codec), depth=2)
        link.post(2)
        if rank == 0:
            store.wait(["looked"])
            link.put(0, torch.ones(4))
            store.wait(["found"])
            link.put(1, torch.ones(4))
        else:
            assert not link.is_here(0)
            store.set("looked", "")
            while not link.is_here(0):
                time.sleep(0.001)
            link.take(0)
            assert not link.is_here(1)
            store.set("found", "")
            assert link.take(1).sum() == 4
        link.flush()

    run_ranks(rank_main, 2, tmp_path)


def test_what_was_sent_is_let_go_of_while_the_step_still_runs(tmp_path: Path) -> None:
    """Else a step of many micro-batches would keep the output of each of them, whatever the schedule holds in flight."""

    def rank_main(rank: int, store: dist.Store) -> None:
        codec = make_codec("none", shape=(256, 256), dtype=torch.float32)
        link = make_link(pair_of_ranks(rank, store), rank, (codec, codec), depth=2)
        link.post(12 if rank == 1 else 0)
        if rank == 0:
            freed: list[int] = []
            for i in range(12):
                message = torch.ones(256, 256)
                weakref.finalize(message.untyped_storage(), freed.append, i)
                link.put(i, message)
                del message
            give_up = time.monotonic() + 20
            while any(not pending.done() for _, pending in link._sends):
                assert time.monotonic() < give_up
                time.sleep(0.01)
            assert sorted(freed) == list(range(12))
        else:
            for i in range(12):
                link.take(i)
        link.flush()

    run_ranks(rank_main, 2, tmp_path)


@pytest.mark.parametrize(("activations", "gradients"), [("bf16", "none"), ("int8", "fp16"), ("int4", "int8")])
def test_each_direction_has_its_codec_and_says_what_it_cost(tmp_path: Path, activations: WireDtype, gradients: WireDtype) -> None:
    shape = (4, 128)
    worst = {"none": 0.0, "fp16": 5e-4, "bf16": 4e-3, "int8": 1e-2, "int4": 0.13}

    def rank_main(rank: int, store: dist.Store) -> None:
        codecs = tuple(make_codec(wire_dtype, shape=shape, dtype=torch.float32) for wire_dtype in (activations, gradients))
        link = make_link(pair_of_ranks(rank, store), rank, codecs, depth=2)  # type: ignore[arg-type]
        sent, received = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (rank, 1 - rank))
        link.post(2)
        link.put(0, sent)
        link.put(1, 2 * sent)
        for i, factor in enumerate((1, 2)):
            difference = ((link.take(i) - factor * received).norm() / (factor * received).norm()).item()
            mine = (activations, gradients)[1 - rank]
            assert difference <= worst[mine]
            assert (difference > 0) == (mine != "none"), "a codec that is asked for and changes nothing does not work"
        link.flush()
        stats, codec = link.pop_stats(), (activations, gradients)[rank]
        assert stats.num_bytes == 2 * codecs[rank].num_bytes
        assert stats.num_bytes < 2 * sent.numel() * 4 or codec == "none"
        relative = (stats.difference_square / stats.square) ** 0.5 if stats.square else 0.0
        assert 0 < relative <= worst[codec] or codec == "none"

    run_ranks(rank_main, 2, tmp_path)


def test_whatever_goes_wrong_in_a_thread_of_a_link_comes_out_where_its_result_is_asked_for(tmp_path: Path) -> None:
    """A thread that died with its error would leave everybody waiting for ever."""

    def rank_main(rank: int, store: dist.Store) -> None:
        codec = make_codec("none", shape=(2,), dtype=torch.float32)
        link = make_link(pair_of_ranks(rank, store), rank, (codec, codec), depth=1)
        transport = link._transport
        assert isinstance(transport, GlooTransport)
        for error in (ValueError("odd"), MemoryError("full")):

            def fail(error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error), match=str(error)):
                transport._sender.submit(fail).result()
        assert transport._sender.submit(lambda: None).result() is None, "the thread goes on"

    run_ranks(rank_main, 2, tmp_path)


def test_receives_are_posted_as_far_ahead_as_messages_may_be_under_way(model_folder: Path, tmp_path: Path) -> None:
    """On gloo a receive that is posted late costs a round trip."""
    tokens, num_targets = example_tokens(8, 24, 320)

    def rank_main(rank: int, store: dist.Store) -> None:
        posted: list[int] = []
        post = ProcessGroupLink.post
        ProcessGroupLink.post = lambda self, n: (post(self, n), posted.append(len(self._receives)))[0]  # type: ignore[method-assign]
        groups = pair_of_ranks(rank, store)
        for schedule, expected in ((Schedule(mode="gpipe"), 8), (Schedule(), 4), (Schedule(extra_warmup=(5,)), 7)):
            gradient = GlobalGradient(
                place=place_of(rank, dp_size=1, pp_size=2),
                groups=groups,
                stage=load(model_folder, *((0, 2), (2, 4))[rank]),
                spans=Spans(),
                peer_names=["", ""],
                schedule=schedule,
                batch_size=8,
                micro_batch_size=1,
                seq_length=24,
                clip_grad_norm=0,
            )
            gradient.compute(tokens[None], num_targets)
            assert posted.pop() == expected

    run_ranks(rank_main, 2, tmp_path)


def test_a_lost_neighbour_is_named(tmp_path: Path) -> None:
    def rank_main(rank: int, store: dist.Store) -> None:
        groups = pair_of_ranks(rank, store)
        if rank == 1:
            store.add("done", 1)
            os._exit(0)
        codec = make_codec("none", shape=(2,), dtype=torch.float32)
        link = make_link(groups, 0, (codec, codec), depth=1, peer_in_words="rank 1 on host far-away")
        with pytest.raises(PeerLost, match="micro-batch 0 from rank 1 on host far-away"):
            (link.post(1), link.take(0))

    run_ranks(rank_main, 2, tmp_path)


def test_the_probe_measures_latency_and_transfer(tmp_path: Path) -> None:
    """Against a transport that is as slow as it says."""
    latency_s, bytes_per_s = 0.01, 50e6

    class SlowTransport(GlooTransport):
        def send(self, message: torch.Tensor, i: int) -> Pending:
            def late() -> None:
                time.sleep(latency_s + message.numel() / bytes_per_s)
                dist.send(message, dst=self._peer, group=self._send_group, tag=i)

            return self._sender.submit(late)

    def rank_main(rank: int, store: dist.Store) -> None:
        pair = (groups := pair_of_ranks(rank, store)).to_next or groups.to_previous
        assert pair is not None
        ways = (pair.activations, pair.gradients)
        transport = SlowTransport(send_group=ways[rank], recv_group=ways[1 - rank], peer=1 - rank, device=torch.device("cpu"))
        sizes = (500_000, 250_000)
        times = time_link(transport, leads=rank == 0, num_bytes=sizes, device=torch.device("cpu"), peer_in_words="")
        if rank == 0:
            assert latency_s <= times.latency_s < 3 * latency_s
            assert 0.8 * sum(sizes) / bytes_per_s < times.transfer_s < 4 * sum(sizes) / bytes_per_s
        transport.close()

    run_ranks(rank_main, 2, tmp_path)


def test_interfaces_are_found_by_name_and_by_route() -> None:
    assert "lo" in list_interfaces()
    assert choose_interface(None, "127.0.0.1").name == "lo"
    assert choose_interface("lo", "127.0.0.1").is_loopback
    with pytest.raises(UserError, match=r"'wg9' is not one of: .*lo \(127\.0\.0\.1\)"):
        choose_interface("wg9", "127.0.0.1")
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid"):
        choose_interface(None, "no.such.host.invalid")


def test_the_interface_is_set_for_gloo_and_nccl_and_a_contradiction_names_both() -> None:
    environment: dict[str, str] = {}
    select_for_transport(choose_interface("lo", "127.0.0.1"), environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    select_for_transport(choose_interface("lo", "127.0.0.1"), environment)
    for variable in environment:
        with pytest.raises(UserError, match=f"{variable} is 'eth7' and the interface is 'lo'"):
            select_for_transport(choose_interface("lo", "127.0.0.1"), {variable: "eth7"})


def test_a_socket_listens_on_its_address_alone_and_a_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=2)
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is taken"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="must be an address of this machine"):
        listen("203.0.113.9", 0)


def test_the_door_must_be_an_address_of_the_chosen_interface() -> None:
    lo = choose_interface("lo", "127.0.0.1")
    assert check_door_is_here(Door(host="127.0.0.1", port=1), lo) == "127.0.0.1"
    others = [i for i in list_interfaces().values() if not i.is_loopback]
    if others:
        with pytest.raises(UserError, match=f"belongs to {others[0].name}, the interface is lo"):
            check_door_is_here(Door(host=others[0].address, port=1), lo)
