"""What travels between ranks: links, gradient buckets that overlap with the backward, interfaces, sockets on one address only."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import example_tokens, run_ranks
from safetensors.torch import load_file, save_file
from test_parity import load
from torch import nn

from comms.groups import join_process_group, make_groups
from comms.interfaces import choose_interface, list_interfaces, select_for_transport
from comms.links import PeerLost, ProcessGroupLink
from comms.place import place_of
from comms.rendezvous import Door, check_door_is_here, listen
from comms.spans import Spans
from data_parallel.allreduce import ALIGNMENT_BYTES, GradientBuckets
from optim.decide import layer_square
from training.gradient import GlobalGradient
from training.job import COLLECTIVE_TIMEOUT
from user_error import UserError


def test_the_first_bucket_is_launched_while_the_last_backward_runs(model_folder: Path, tmp_path: Path) -> None:
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
            pp_mode="gpipe",
            batch_size=4,
            micro_batch_size=2,
            seq_length=24,
            clip_grad_norm=0,
        )
        gradient.compute(tokens.view(1, 2, 4, 2, 24)[:, rank], num_targets)
        backwards = [span for span in spans.recorded if span.name == "backward"]
        losses = [span for span in spans.recorded if span.name == "loss"]
        launches = [span for span in spans.recorded if span.name == "allreduce launched"]
        assert [span.micro_batch for span in backwards] == [0, 1]
        assert len(launches) == 6, "embeddings, four layers and head: a bucket never joins two"
        assert losses[-1].end <= launches[0].start < backwards[-1].end, "the first bucket starts inside the last backward"
        assert launches[-2].start < backwards[-1].end

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
                pp_mode="gpipe",
                batch_size=2,
                micro_batch_size=1,
                seq_length=24,
                clip_grad_norm=0.5,
            )
            gradient.compute(tokens.view(1, 3, 2, 2, 24)[:, place.dp], num_targets)
            if place.dp == 0:
                found = {name: p.grad.clone() for name, p in stage.named_parameters()}  # type: ignore[union-attr]
                save_file(found, tmp_path / f"{stages}_{place.pp}.safetensors")

        run_ranks(rank_main, 3 * stages, tmp_path)
        return {name: t for path in tmp_path.glob(f"{stages}_*.safetensors") for name, t in load_file(path).items()}

    one, two = run(1), run(2)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_links_deliver_in_order_own_their_storage_and_reuse_few_buffers(tmp_path: Path) -> None:
    num_messages, depth = 9, 3

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=1, pp_size=2)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        groups = make_groups(place, "gloo", COLLECTIVE_TIMEOUT)
        pair = groups.to_next or groups.to_previous
        assert pair is not None
        ways = (pair.activations, pair.gradients) if rank == 0 else (pair.gradients, pair.activations)
        link = ProcessGroupLink(
            send_group=ways[0],
            recv_group=ways[1],
            peer=1 - rank,
            peer_in_words="the other",
            shape=(3, 5),
            dtype=torch.float32,
            device=torch.device("cpu"),
            depth=depth,
        )
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
        assert len(link._buffers) == depth

    run_ranks(rank_main, 2, tmp_path)


def test_a_lost_neighbour_is_named(tmp_path: Path) -> None:
    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=1, pp_size=2)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        groups = make_groups(place, "gloo", COLLECTIVE_TIMEOUT)
        pair = groups.to_next or groups.to_previous
        assert pair is not None
        if rank == 1:
            store.add("done", 1)
            os._exit(0)
        link = ProcessGroupLink(
            send_group=pair.activations,
            recv_group=pair.gradients,
            peer=1,
            peer_in_words="rank 1 on host far-away",
            shape=(2,),
            dtype=torch.float32,
            device=torch.device("cpu"),
            depth=1,
        )
        with pytest.raises(PeerLost, match="micro-batch 0 from rank 1 on host far-away"):
            (link.post(1), link.take(0))

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
