"""The steps of `Pipeline.save` and `Pipeline.load`, on one process or on all ranks together.

::

    save    1. every rank: take its stages apart             load    1. every rank: check the files
            2. all: exchange plans; rank 0 makes the folder          2. check that the checkpoint fits, read its tensors
            3. every rank: write its tensors                         3. if no rank has failed: put them in place
            4. rank 0: metadata and manifest, then rename

If a rank fails in 1 to 3, all ranks raise, nothing has changed, and the run goes on.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from ..atomic_file import whole_file
from ..engine.base import Engine
from ..errors import StageError
from ..methods import Method
from ..optim.factories import group_options
from ..schedule import most_in_flight
from ..stage.stage import Stage
from ..typing import Json, StateDict
from . import checks, exact, folder, manifest, portable, state_dict
from .coding import Decoder, Encoder, TensorSpec, tensor_keys
from .manifest import Checkpoint, CheckpointError, PartlyLoadedError, first_line

T = TypeVar("T")
Kind = Literal["exact", "portable"]


def save(engine: Engine, path: str | os.PathLike[str], kind: Kind, settings: dict[str, Json], extra: Json) -> None:
    """Write a checkpoint.

    Args:
        engine: engine whose stages are saved; nothing is in flight if ``kind`` is portable.
        path: folder of the checkpoint.
        kind: exact or portable.
        settings: settings of the pipeline, from `settings_of`.
        extra: value that the caller adds.

    Raises:
        CheckpointError: on every rank, with what went wrong on one; what was there before is as it was.
    """
    replacement = folder.Replacement(Path(os.path.abspath(os.path.expanduser(path))))
    try:
        _save(engine, replacement, kind, settings, extra)
    except BaseException:
        replacement.discard()
        raise
    finally:
        replacement.close()


def _save(engine: Engine, replacement: folder.Replacement, kind: Kind, settings: dict[str, Json], extra: Json) -> None:
    from .tensors import TensorWriter  # torch may have been built without torch.distributed

    progress, encoder = engine.progress("save"), Encoder()
    stages = [(stage.index, stage.replica) for stage in engine.stages]

    def take_apart() -> dict[str, Json]:
        head = manifest.header(kind, extra)
        if kind == "exact":
            parts = [exact.encode_stage(encoder, *pair) for pair in zip(engine.stages, progress, strict=True)]
        else:  # replicas agree, so that the first is enough
            parts = [portable.encode_part(encoder, stage) for stage in engine.stages if stage.replica == 0]
        if engine.is_first:
            replacement.begin()
        return {"head": head, "parts": parts, "stages": stages, "tensors": encoder.specs}

    ranks = _on_all_ranks(engine, replacement.folder, take_apart)
    place = next(i for i, rank in enumerate(ranks) if rank["stages"] == stages)
    # A tensor without elements needs no more than its entry in the manifest.
    tensors = {key: tensor for key, tensor in encoder.tensors.items() if tensor.numel()}
    writer = TensorWriter(replacement.new, tensors if kind == "exact" else portable.nested(tensors), place)
    plans = _on_all_ranks(engine, replacement.folder, writer.prepare)
    results = _on_all_ranks(engine, replacement.folder, lambda: writer.write(plans))

    def finish() -> None:
        if engine.is_first:
            writer.finish(results)
            content = {
                **ranks[0]["head"],
                **settings,
                "num_updates": progress[0].num_updates,
                "next_microbatch": progress[0].next_microbatch,
                "num_infers": engine.stages[0].num_infers,
                **_surroundings(),
                "engine": _engine_name(engine),
                "files": {path.name: manifest.describe(path) for path in sorted(replacement.new.iterdir())},
                "tensors": {key: spec for rank in ranks for key, spec in rank["tensors"].items()},
                "state": _merge(kind, ranks),
            }
            with whole_file(replacement.new / manifest.NAME) as file:
                file.write(manifest.written(content))
            replacement.replace()

    _on_all_ranks(engine, replacement.folder, finish)


def _merge(kind: Kind, ranks: list[dict[str, Json]]) -> dict[str, Json]:
    """The state in the manifest, from all ranks' parts."""
    if kind == "portable":
        return portable.merge_parts([part for rank in ranks for part in rank["parts"]])
    pairs = [pair for rank in ranks for pair in zip(rank["stages"], rank["parts"], strict=True)]
    return {f"{index}.{replica}": part for (index, replica), part in pairs}


def _on_all_ranks(engine: Engine, target: Path, job: Callable[[], T]) -> list[T]:
    """The results of ``job`` on all ranks; if it fails on one rank, all raise."""
    result, error, reasons = engine.try_on_all("save", job, _reason)
    if not reasons:
        return engine.gather("save", cast(T, result))
    if isinstance(error, (CheckpointError, TypeError)):
        raise error
    rank, reason = next(iter(reasons.items()))
    where = "" if engine.alone else f" on rank {rank}"
    raise CheckpointError(
        f"nothing was saved to {target}{where}: {reason}; what was there before is as it was"
    ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, (CheckpointError, TypeError)):
        return first_line(error, "")
    # A full disk shows as an error of the writer of archives, which is left with half of one.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    return f"{type(error).__name__}: {first_line(error, '')}"


def load(
    engine: Engine,
    path: str | os.PathLike[str],
    settings: dict[str, Json],
    shapes: state_dict.Shapes,
    *,
    scheduler: bool,
    left_open: Collection[str] = (),
) -> Callable[[], tuple[Json, dict[str, int]]]:
    """Check a checkpoint against the pipeline, and read what this process needs of it.

    Args:
        engine: engine whose stages it is for.
        path: folder of the checkpoint.
        settings: settings of the pipeline, from `settings_of`.
        shapes: shapes of the whole model's entries, from `state_dict.shapes_of`.
        scheduler: whether the pipeline has a learning-rate scheduler.
        left_open: which of the ``settings`` an exact checkpoint decides, since the caller has not.

    Returns:
        A function that puts it in place, and returns the value that the caller had added, and what the pipeline has from
        the checkpoint now: ``seed``, ``num_microbatches`` and ``microbatch_samples``.

    Raises:
        CheckpointError: damaged, or another pipeline's; nothing has changed.
    """
    found = manifest.inspect(path)
    with portable.reading(found):
        is_exact = found.kind == "exact"
        if is_exact:
            taken = {name: found.manifest.get(name, 1) for name in _PARTS if name in left_open}
            settings = settings | taken
            put = _load_exact(engine, found, settings)
        else:
            put = _load_portable(engine, found, shapes, scheduler)
    num_infers = found.manifest.get("num_infers", 0)
    checks.expect_counts([num_infers], "the number of infer calls", 1)

    decided = {"seed": found.manifest["seed"], **{name: settings[name] for name in _PARTS}}

    def commit() -> tuple[Json, dict[str, int]]:
        try:
            put()
            engine.divide_by(*(decided[name] for name in _PARTS))
            for stage in engine.stages:
                stage.num_infers = num_infers
        except StageError:
            raise
        except Exception as error:  # from the caller's own classes, of a part that looked right
            raise PartlyLoadedError(
                f"{found.folder} cannot be put in place ({type(error).__name__}: {first_line(error)}); this pipeline is of no use "
                "now: make a new one, and use another checkpoint"
            ) from error
        return found.extra, decided

    return commit


def _load_portable(engine: Engine, found: Checkpoint, shapes: state_dict.Shapes, scheduler: bool) -> Callable[[], None]:
    names = {name for stage in engine.stages for name in [*stage.whole.state_dict(), *stage.called]}
    names |= {tie.name for stage in engine.stages for tie in stage.ties}
    changed = found.manifest["state"].get("buffers", [])
    checks.expect(isinstance(changed, list) and set(map(type, changed)) <= {str}, "the buffers that have changed")
    state = portable.decode(found, names.union(changed))
    sections = state_dict.sections(state)
    saved_groups = [group for section in sections for group in section["optimizer"]["param_groups"]]
    for stage in engine.stages:
        if stage.lr_scheduler is not None:
            checks.expect_alike(stage.lr_scheduler.state_dict(), state["scheduler"], "the scheduler")
        _check_options(stage, saved_groups)
    for section in sections:
        checks.expect_optimizer_state("the model", section["optimizer"]["state"], names)
    for name, value in state["model"].items():
        fits = not isinstance(shapes.get(name), torch.Size) or isinstance(value, torch.Tensor)
        checks.expect(fits, f"{name} is no tensor")
    try:
        write = state_dict.check_state(engine.stages, state, shapes, scheduler=scheduler)
    except ValueError as error:  # which says what to change
        raise CheckpointError(f"{found.folder}: {error}") from error

    def put() -> None:
        for stage in engine.stages:
            stage.drop()
            stage.draws.seed = found.manifest["seed"]
        write()
        engine.resume_at_rest(found.num_updates, found.manifest["next_microbatch"])

    return put


def _check_options(stage: Stage, saved_groups: list[StateDict]) -> None:
    """Compare the options of a stage's optimizer with those of the saved groups that hold its parameters."""
    by_place = bool(stage.options_of_place)
    for group in stage.optimizer.param_groups if stage.optimizer is not None else ():
        current, members = group_options(group), state_dict.saved_names(stage, group)
        for saved in saved_groups:
            if members & set(saved["params"]):
                for option in current.keys() & saved.keys():
                    checks.expect_alike(current[option], saved[option], f"the option {option!r}")
                if not by_place or state_dict.is_saved_whole(stage, group, saved_groups):
                    checks.warn_of_options(f"stage {stage.index}", current, saved)


_COUNTED = {"num_stages": "stages", "num_replicas": "replicas", "num_microbatches": "micro-batches"}
_PARTS = ("num_microbatches", "microbatch_samples")  # how mini-batches are cut; checkpoints without the last have 1
_CHANGES_RESULTS = ("keep", "max_grad_norm", "clip", "loss_weight")
_CHANGES_BITS = {
    "threads": "torch.set_num_threads() sets it",
    "torch": "install that one",
    "devices": "pass devices=",
    "compiled": "pass compile=",
}


def _load_exact(engine: Engine, found: Checkpoint, settings: dict[str, Json]) -> Callable[[], None]:
    from .tensors import read_tensors

    saved = found.manifest
    for difference in _differences(found, settings):
        advice = "make the pipeline with the same arguments, or save with portable=True to change them"
        raise CheckpointError(f"{found.folder} {difference}; {advice}")
    _warn_of_settings(saved, settings)
    for name, part in sorted(saved["state"].items()):
        exact.check_form(f"stage {name}", part)
    method = engine.stages[0].method
    checks.expect_one_run(saved, [most_in_flight(method, found.num_stages, k) for k in range(found.num_stages)])
    stages = []
    for stage in engine.stages:
        part, common = saved["state"][f"{stage.index}.{stage.replica}"], saved["state"][f"{stage.index}.0"]
        is_shared = not stage.versions.owns_state  # one of the caller's, of all stages of a process
        if part["predictor"] is not None and is_shared and saved["engine"] != _engine_name(engine):
            raise CheckpointError(
                f"{found.folder} holds the state of a predictor in a {saved['engine']} run, where each process has its own; load "
                "it in such a run, or save with portable=True"
            )
        stages.append((stage, part, {name: common[name] for name in exact.COMMON}))
    specs = {key: TensorSpec(key, saved["tensors"][key]) for key in tensor_keys([[*pair] for _, *pair in stages])}
    decoder = Decoder(read_tensors(found.folder, saved["files"], specs), specs)
    ready = [exact.SavedStage(decoder, part, common, stage) for stage, part, common in stages]

    def put() -> None:
        for stage in ready:
            stage.put(saved["seed"])
        engine.resume([stage.progress for stage in ready])

    return put


def _differences(found: Checkpoint, settings: dict[str, Json]) -> Iterator[str]:
    """What is otherwise in the pipeline that wrote a checkpoint, and decides results."""
    saved = found.manifest
    for name, word in _COUNTED.items():
        if saved[name] != settings[name]:
            yield f"was saved with {saved[name]} {word}, and this pipeline has {settings[name]}"
    defaults = {field.name: field.default for field in dataclasses.fields(Method)}  # of fields that older ones lack
    for name, value in settings["method"].items():
        theirs = saved["method"].get(name, defaults[name])
        if theirs != value:
            yield (
                f"was saved by method {found.method!r} with {name}={theirs!r}, and this pipeline has "
                f"{settings['method']['name']!r} with {name}={value!r}"
            )
    for k, (theirs, ours) in enumerate(zip(saved["layers"], settings["layers"], strict=True)):
        if theirs != ours:
            layers = f"{', '.join(theirs)} there and {', '.join(ours)} here"
            yield f"is another model's, or cut elsewhere: stage {k} has the layers {layers}"
    values = {name: saved.get(name) for name in _CHANGES_RESULTS} | {_PARTS[1]: saved.get(_PARTS[1], 1)}
    for name, value in values.items():
        if value != settings[name]:
            yield f"was saved with {name}={value}, and this pipeline has {name}={settings[name]}"


def _warn_of_settings(saved: dict[str, Json], settings: dict[str, Json]) -> None:
    """Warn of settings that may differ, but change bits or what is done with gradients that are not finite."""
    now = {**settings, **_surroundings()}
    checks.expect(type(saved["torch"]) is str and type(saved["compiled"]) is bool, "its surroundings")
    checks.expect(isinstance(saved["devices"], list) and {*map(type, saved["devices"])} == {str}, "its devices")
    checks.expect(isinstance(saved["on_nonfinite"], str), "its on_nonfinite")
    for name, cure in _CHANGES_BITS.items():
        if saved[name] != now[name]:
            warnings.warn(
                f"the checkpoint was saved with {name}={saved[name]}, and it is {now[name]} now, which can change the last "
                f"bits of what follows; {cure}",
                stacklevel=2,
            )
    if saved["on_nonfinite"] != settings["on_nonfinite"]:
        warnings.warn(
            f"the checkpoint was saved with on_nonfinite={saved['on_nonfinite']!r}, and this pipeline has "
            f"{settings['on_nonfinite']!r}: from here on a gradient that is not finite is treated otherwise",
            stacklevel=2,
        )


def _engine_name(engine: Engine) -> str:
    return "local" if engine.alone else "distributed"


def _surroundings() -> dict[str, Json]:
    """Settings of the process that can change last bits."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def settings_of(stage: Stage, stages: list[tuple[int, list[str], str]], **settings: Json) -> dict[str, Json]:
    """The settings of a pipeline, most of which must be the same to load an exact checkpoint.

    Args:
        stage: any stage of this process: they have the same rule for gradients, and are all compiled, or none is.
        stages: `describe_stage` of every stage.
        settings: ``method`` (its fields), ``num_microbatches``, ``seed`` and ``keep`` of the pipeline.
    """
    first_replica = [(layers, device) for replica, layers, device in stages if replica == 0]
    return {
        **settings,
        "num_stages": len(first_replica),
        "num_replicas": max(replica for replica, _, _ in stages) + 1,
        "layers": [layers for layers, _ in first_replica],
        "max_grad_norm": stage.rule.max_norm,
        "clip": stage.rule.clip,
        "on_nonfinite": stage.rule.on_nonfinite,
        "compiled": stage.compiles,
        "devices": [device for _, device in first_replica],
    }


def describe_stage(stage: Stage) -> tuple[int, list[str], str]:
    """A stage's replica, the names of its layers, and the type of its device."""
    return stage.replica, [name for name, _ in stage.module.named_children()], stage.device.type
