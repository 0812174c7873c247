"""The table of methods, and the combinations it refuses."""

from __future__ import annotations

import dataclasses

import oracles
import pytest

from dtrp import Method, get_method, list_methods


def test_the_rows_are_those_of_the_equations() -> None:
    assert list_methods() == list(oracles.ROWS)
    for name, row in oracles.ROWS.items():
        fields = dataclasses.asdict(get_method(name))
        assert fields.pop("name") == name
        assert fields == dataclasses.asdict(row)


def test_adl_is_fdg_by_another_name() -> None:
    """benchmarks/accuracy does not run it where `num_microbatches` is 1; what they differ in is the A each is meant for."""
    assert get_method("adl", name="fdg") == get_method("fdg")
    assert oracles.ROWS["adl"] == oracles.ROWS["fdg"]


@pytest.mark.parametrize("name", list_methods())
def test_every_method_says_what_it_does(name: str) -> None:
    text = get_method(name).__doc__
    assert text is not None
    for word in ("Update", "Memory", "Source"):
        assert word in text
    assert "elay" in text


def test_any_field_can_be_changed() -> None:
    method = get_method("fdg", grad_shrink=0.5, backward_first=True, name="mine")
    assert (method.name, method.grad_shrink, method.backward_first, method.ahead) == ("mine", 0.5, True, 2)
    assert get_method("dtrp", predict="none").predict is None
    assert get_method("dtrp") == get_method("dtr", predict="rollout", name="dtrp")


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("spectran", {}, "unknown method 'spectran'; did you mean 'spectrain'"),
        ("nothing like it", {}, "unknown method 'nothing like it'; known: bp, gpipe"),
        ("fdg", {"name": "my fdg"}, "name='my fdg': a method's name is one word"),
        ("fdg", {"ahead": 0.5}, "ahead=0.5: a gradient takes at least one slot"),
        ("fdg", {"ahead": float("inf")}, "ahead=inf"),
        ("fdg", {"ahead": float("nan")}, "ahead=nan"),
        ("fdg", {"keep": "weights"}, "keep='weights': choose one of 'graph', 'input'"),
        ("fdg", {"keep": "auto"}, "keep='auto'"),
        ("fdg", {"backward_at": "predicted"}, "backward_at='predicted'"),
        ("fdg", {"backward_first": 1}, "backward_first=1: pass True or False"),
        ("fdg", {"grad_shrink": 0}, "grad_shrink=0: a shrinking factor"),
        ("fdg", {"grad_shrink": 1.5}, "grad_shrink=1.5"),
        ("dtrp", {"lr_shrink": -1}, "lr_shrink=-1"),
        ("dtrp", {"predict": "cubic"}, "predict='cubic': choose 'linear', 'rollout', 'informed', 'none'"),
        ("dtrp", {"predict": 3}, "predict=3 cannot be called"),
        ("dtrp", {"keep": "graph"}, "keep='graph' with backward_at='current': a kept graph holds"),
        ("fdg", {"backward_at": "current"}, "keep='input' to recompute"),
        ("bp", {"predict": "linear"}, "no delay to predict over"),
        ("dtrp", {"flush": True}, "no delay to predict over"),
        ("dtrp", {"forward_all": True}, "forward_all=True with flush=False"),
        ("gpipe", {"ahead": 2}, "neither ahead nor backward_first"),
        ("gpipe", {"backward_first": True}, "neither ahead nor backward_first"),
        ("dgl", {"local": 1}, "local=1: pass True or False"),
        ("dgl", {"ahead": 2}, "ahead=2 with local=True: .* no forward runs ahead; leave it at 1"),
        ("dgl", {"backward_first": True}, "no earlier backward to come first; leave it at False"),
        ("dgl", {"predict": "linear"}, "no delay to predict over; leave it at None"),
        ("dgl", {"grad_shrink": 0.5}, "no gradient is received to be shrunk"),
        ("dgl", {"flush": True}, "nothing is ever left to flush"),
        ("dgl", {"forward_all": True}, "forwards do not wait for others"),
        ("fdg", {"local": True}, "ahead=2 with local=True"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(name: str, options: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        get_method(name, **options)


def test_an_option_that_is_no_field() -> None:
    with pytest.raises(TypeError, match=r"unknown field of a method 'grad_shrunk'; did you mean 'grad_shrink'\?"):
        get_method("fdg", grad_shrunk=0.5)


def test_a_row_of_ones_own() -> None:
    method = Method("mine", 1.5, True, "input", "current", "linear")
    assert (method.grad_shrink, method.lr_shrink, method.flush, method.forward_all) == (1.0, 1.0, False, False)
