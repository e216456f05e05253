"""The public names are few, and change only on purpose."""

import inspect

import seqpar
import seqpar.comm
import seqpar.kernels


def test_public_names() -> None:
    assert set(seqpar.__all__) == {
        *("Full", "Causal", "SlidingWindow", "Documents", "PrefixLM", "Chunked", "Mask"),
        *("SparselySharded", "SinkWindow", "PerHead", "KVCache"),
        *("plan", "Plan", "Layout", "AllGather", "Auto", "DoubleRing", "Rates", "Ring", "Tree", "Ulysses"),
        *("attention", "attention_with_lse", "AttentionOutput", "token_mean", "checkpoint_context"),
    }
    assert all(hasattr(seqpar, name) for name in seqpar.__all__)


def test_everything_public_is_documented() -> None:
    for module in (seqpar, seqpar.comm, seqpar.kernels):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), f"{module.__name__}.{name}"


def test_no_module_hides_a_function() -> None:
    assert callable(seqpar.plan)
    assert callable(seqpar.attention)
