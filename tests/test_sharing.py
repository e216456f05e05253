"""Plans that layers share, and what configurations can say."""

import gc
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqpar
from seqpar.comm import World, run_loopback
from seqpar.integrations import sharing
from seqpar.integrations.options import AttentionOptions, share_of_heads
from seqpar.integrations.packing import packed_documents, padded_documents, zigzag_by_document
from seqpar.integrations.sharing import KEPT, SharedPlans, bounds_of


class Layer:
    pass


def test_the_first_of_a_team_agrees_and_the_others_find_its_plan() -> None:
    first, second = Layer(), Layer()

    def calls(world: World) -> list[int]:
        shared = SharedPlans(world)
        counts = []
        for caller, length in ((first, 8), (second, 8), (first, 8), (first, 9), (second, 8), (second, 10), (first, 11)):
            world.meter.reset()
            plan = shared.plan(shared.leads(caller, "team"), seqpar.Causal(), length=length)
            assert plan.length == length
            counts.append(world.meter.by_kind["agree"].calls if world.meter.by_kind else 0)
        return counts

    # The second, called again, begins a batch, in which the first finds nothing of eleven tokens and asks for itself.
    assert run_loopback(2, calls) == [[1, 0, 1, 1, 0, 1, 1]] * 2


def test_who_leads_is_the_same_where_a_layer_lives_on() -> None:
    """A rank may keep a model, for averages or in a cycle, that another has dropped."""

    def leading(world: World) -> list[bool]:
        shared, first, second = SharedPlans(world), Layer(), Layer()
        led = [shared.leads(layer, "team") for layer in (first, second)]
        if world.rank == 1:
            del first
            gc.collect()
        return [*led, *(shared.leads(second, "team") for _ in range(2))]

    assert run_loopback(2, leading) == [[True, False, True, True]] * 2


def test_a_refusal_of_the_first_reaches_every_rank() -> None:
    def refused(world: World) -> str:
        shared, layer = SharedPlans(world), Layer()
        try:
            leads = shared.leads(layer, "team")
            if world.rank == 1:
                shared.refuse(leads, ValueError("too long"))
            shared.plan(leads, seqpar.Causal(), length=8)
        except ValueError as error:
            return str(error)
        return "nothing"

    assert run_loopback(2, refused) == ["rank 1: too long"] * 2


def test_plans_are_bounded_and_go_with_their_layers() -> None:
    shared = SharedPlans.of(None)
    assert SharedPlans.of(None) is shared
    plans = [shared.plan(True, seqpar.Causal(), length=length) for length in range(1, KEPT + 3)]
    assert shared.plan(False, seqpar.Causal(), length=KEPT) is plans[KEPT - 1]
    assert len(shared._plans) == KEPT
    del shared
    gc.collect()
    assert not sharing._of_groups


def test_bounds_are_read_again_where_they_changed() -> None:
    cu_seqlens = torch.tensor([0, 3, 5])
    assert bounds_of(cu_seqlens) is bounds_of(cu_seqlens)
    cu_seqlens[1] = 4
    assert bounds_of(cu_seqlens) == [0, 4, 5]
    with torch.inference_mode():
        assert bounds_of(torch.tensor([0, 7])) == [0, 7]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_padding_is_kept_apart(documents: list[tuple[int, int]]) -> None:
    """Each document and the padding after it, told by brute force."""
    lengths, begins, whose = [0], [0], []
    for number, (filled, padding) in enumerate(documents):
        lengths.append(lengths[-1] + filled)
        begins.append(begins[-1] + filled + padding)
        whose += [(number, "text")] * filled + [(number, "padding")] * padding
    if whose:
        mask = padded_documents(lengths, begins)
        mask.check(len(whose), len(whose))
        start, end = mask.intervals(torch.arange(len(whose)), len(whose), len(whose))
        for query, owner in enumerate(whose):
            seen = [key for key, other in enumerate(whose) if other == owner]
            assert (int(start.flatten()[query]), int(end.flatten()[query])) == (seen[0], seen[-1] + 1)


def test_a_zigzag_by_document_gives_each_rank_a_chunk_from_either_end() -> None:
    layout = zigzag_by_document((0, 8, 12), 2)
    assert [held.tensor.tolist() for held in layout.queries] == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


@pytest.mark.parametrize(
    ("lengths", "begins", "message"),
    [
        ([0, 6, 8], [0, 4, 12], "documents of [6, 2] tokens in places of [4, 8]"),
        ([0, 3], [0, 4, 12], "documents of [3] tokens in places of [4, 8]"),
        ([0, 3, 2], [0, 4, 12], "documents of [3, -1] tokens in places of [4, 8]"),
    ],
)
def test_documents_that_do_not_fit_their_places_are_refused(lengths: list, begins: list, message: str) -> None:
    bounds, places = torch.tensor(lengths), torch.tensor(begins)
    packed = SimpleNamespace(
        cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=places, cu_seqlens_kv_padded=places
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_documents(packed, 12, 2)


def test_documents_may_be_empty() -> None:
    bounds = torch.tensor([0, 4, 4, 8, 8])
    packed = SimpleNamespace(
        cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None
    )
    documents, layout = packed_documents(packed, 8, 2)
    assert documents == seqpar.Documents([0, 4, 8])
    assert layout == zigzag_by_document((0, 4, 8), 2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_of_heads_see_what_the_heads_saw(ranks: int) -> None:
    mask = seqpar.SparselySharded(16, 1, 3, dense_heads=1)
    shares = [share_of_heads(mask, 4, rank, ranks, 128) for rank in range(ranks)]
    assert [residue for share in shares for residue in share.residues(4 // ranks)] == list(mask.residues(4))
    assert [share.dense_heads for share in shares] == [0] * (ranks - 1) + [1]


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"mask": "causl"}, "mask: got 'causl', expected one of causal, full"),
        ({"window": 3}, "window: got 3 with mask 'causal', expected mask window"),
        ({"mask": "window"}, "window: got None with mask window, expected a positive number of tokens"),
        ({"degree": 2}, "degree: got 2 with schedule None, expected schedule double_ring or hybrid"),
        ({"exchange": "direct", "schedule": "ulysses"}, "exchange: got 'direct' with schedule 'ulysses'"),
        ({"mask": "s2", "s2_block": 17}, "got 17, expected a power of two"),
        ({"s2_dense_layers": 3, "mask": "s2"}, "s2_dense_layers: got 3, expected a list of layers"),
        ({"scedule": "ring"}, "unknown key 'scedule'; did you mean 'schedule'"),
    ],
)
def test_options_that_do_not_fit_are_refused(given_options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^here: ") as caught:
        AttentionOptions.of(given_options, "here")
    assert message in str(caught.value)


def test_options_give_each_layer_its_mask() -> None:
    options = AttentionOptions(mask="s2", s2_dense_layers=[1])
    assert options.layer_masks(3, 4)[1] == seqpar.Causal()
    assert options.layer_mask(0, 4) == options.layer_mask(2, 4) == seqpar.SparselySharded(64, 16, 4)
    assert AttentionOptions(mask="window", window=8).layer_mask(0, 1) == seqpar.SlidingWindow(7)
    with pytest.raises(ValueError, match=r"got 1 for a model of 1 layers, expected 0 \.\. 0"):
        options.layer_masks(1, 4)
