"""What `Pipeline.save` and `Pipeline.load` do, on one process or on all ranks together.

::

    save    1. every rank: take its stages apart             load    1. every rank: check the files
            2. all: exchange plans; rank 0 makes the folder          2. check that the checkpoint fits, read its tensors
            3. every rank: write its tensors                         3. if no rank has failed: put them in place
            4. rank 0: metadata and manifest, then rename

A rank that fails in 1 to 3 fails all, nothing has changed, and the run goes on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ..atomic_file import whole_file
from ..engine.base import Engine, come_to_rest
from ..errors import StageError
from ..schedule import lead
from ..stage.gradients import GradientRule
from ..stage.stage import Stage
from . import checks, exact, folder, manifest, portable, state_dict
from .coding import Decoder, Encoder, Spec, tensor_keys
from .manifest import Checkpoint, CheckpointError

T = TypeVar("T")


def save(
    engine: Engine,
    path: str | os.PathLike[str],
    kind: Literal["exact", "portable"],
    settings: dict[str, Any],
    extra: Any,
) -> None:
    """Write a checkpoint.

    Args:
        engine: whose stages are saved; nothing is in flight if ``kind`` is portable.
        path: of the folder.
        kind: exact or portable.
        settings: of the pipeline; see `settings_of`.
        extra: what the caller adds.

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


def _save(
    engine: Engine,
    replacement: folder.Replacement,
    kind: Literal["exact", "portable"],
    settings: dict[str, Any],
    extra: Any,
) -> None:
    from .tensors import Saving  # torch may have been built without torch.distributed

    target, new = replacement.folder, replacement.new
    progress = engine.progress("save")
    encoder = Encoder()

    def take_apart() -> dict[str, Any]:
        head = manifest.header(kind, extra)
        if kind == "exact":
            parts = [exact.encode_stage(encoder, *own) for own in zip(engine.stages, progress, strict=True)]
        else:  # replicas agree, so the first speaks for all
            parts = [portable.encode_part(encoder, stage) for stage in engine.stages if stage.replica == 0]
        if engine.is_first:
            replacement.begin()
        stages = [(stage.index, stage.replica) for stage in engine.stages]
        return {"head": head, "parts": parts, "stages": stages, "tensors": encoder.specs}

    everything = _together(engine, target, take_apart)
    here = [(stage.index, stage.replica) for stage in engine.stages]
    place = next(i for i, other in enumerate(everything) if other["stages"] == here)
    # A tensor without elements is all in its description.
    tensors = {key: tensor for key, tensor in encoder.tensors.items() if tensor.numel()}
    saving = Saving(new, tensors if kind == "exact" else portable.nested(tensors), place)
    plans = _together(engine, target, saving.prepare)
    results = _together(engine, target, lambda: saving.write(plans))

    def finish() -> None:
        if not engine.is_first:
            return
        saving.finish(results)
        files = {path.name: manifest.describe(path) for path in sorted(new.iterdir())}
        state: dict[str, Any]
        if kind == "exact":
            state = {
                f"{index}.{replica}": part
                for other in everything
                for (index, replica), part in zip(other["stages"], other["parts"], strict=True)
            }
        else:
            merged = state_dict.merge_state([part for other in everything for part in other["parts"]])
            flat = [{"model": section["model"], **section["optimizer"]} for section in state_dict.sections(merged)]
            state = {**flat[0], "scheduler": merged["scheduler"], **({"aux": flat[1]} if len(flat) > 1 else {})}
            state |= {"buffers": merged["buffers"]} if "buffers" in merged else {}
        specs = {key: spec for other in everything for key, spec in other["tensors"].items()}
        whole = {
            **everything[0]["head"],
            **settings,
            "num_updates": progress[0].num_updates,
            "next_microbatch": progress[0].next_microbatch,
            **_surroundings(),
            "engine": "local" if engine.alone else "distributed",
            "files": files,
            "tensors": specs,
            "state": state,
        }
        with whole_file(new / manifest.NAME) as file:
            file.write(manifest.written(whole))
        replacement.replace()

    _together(engine, target, finish)


def _together(engine: Engine, target: Path, job: Callable[[], T]) -> list[T]:
    """Every rank's result; where one fails, all raise."""
    error: Exception | None = None
    result: Any = None
    try:
        result = job()
    except Exception as failed:
        error = failed
    everything = engine.gather("save", (result, _reason(error)))
    reasons = [(rank, reason) for rank, (_, reason) in enumerate(everything) if reason is not None]
    if not reasons:
        return [value for value, _ in everything]
    if isinstance(error, (CheckpointError, TypeError)):
        raise error
    rank, reason = reasons[0]
    where = "" if engine.alone else f" on rank {rank}"
    raise CheckpointError(
        f"nothing was saved to {target}{where}: {reason}; what was there before is as it was, and training can go on"
    ) from error


def _reason(error: BaseException | None) -> str | None:
    if error is None:
        return None
    if not isinstance(error, (CheckpointError, TypeError)):
        # A full disk shows as an error of the writer of archives, which is left with half of one.
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, OSError):
            inner = inner.__cause__ or inner.__context__
        error = error if inner is None else inner
    first = str(error).splitlines()[0] if str(error) else ""
    return first if isinstance(error, (CheckpointError, TypeError)) else f"{type(error).__name__}: {first}"


def load(
    engine: Engine,
    path: str | os.PathLike[str],
    settings: dict[str, Any],
    shapes: dict[str, Any],
    *,
    scheduler: bool,
) -> Callable[[], tuple[Any, int]]:
    """Check a checkpoint against the pipeline, and read what this process needs of it.

    Args:
        engine: whose stages it is for.
        path: of the folder.
        settings: of the pipeline; see `settings_of`.
        shapes: of the whole model, as `state_dict.shapes_of`.
        scheduler: whether the pipeline has a learning-rate scheduler.

    Returns:
        What puts it in place, and returns what the caller had added to it, and its seed.

    Raises:
        CheckpointError: damaged, or another pipeline's; nothing has changed.
    """
    found = manifest.inspect(path)
    if found.kind == "portable":
        put = portable.guarded(found, lambda: _portable(engine, found, shapes, scheduler))
    else:
        put = portable.guarded(found, lambda: _exact(engine, found, settings))
    seed = found.manifest["seed"]

    def commit() -> tuple[Any, int]:
        try:
            put()
        except StageError:
            raise
        except Exception as error:  # of a part that looked right: the caller's own classes refuse it
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            raise CheckpointError(
                f"{found.folder} cannot be put in place ({type(error).__name__}: {reason}); this pipeline is of no use now: make a "
                "new one, and use another checkpoint"
            ) from error
        return found.extra, seed

    return commit


def _portable(engine: Engine, found: Checkpoint, shapes: dict[str, Any], scheduler: bool) -> Callable[[], None]:
    names = {name for stage in engine.stages for name in [*stage.whole.state_dict(), *stage.called]}
    names |= {tie.name for stage in engine.stages for tie in stage.ties}
    changed = found.manifest["state"].get("buffers", [])
    checks.expect(isinstance(changed, list) and set(map(type, changed)) <= {str}, "the buffers that have changed")
    state = portable.decode(found, names.union(changed))
    for stage in engine.stages:
        if stage.lr_scheduler is not None:
            checks.alike(stage.lr_scheduler.state_dict(), state["scheduler"], "the scheduler")
        for group in stage.optimizer.param_groups if stage.optimizer is not None else ():
            own = {name: value for name, value in group.items() if name != "params"}
            parameters = dict(zip(stage.names, stage.parameters, strict=True))
            members = {name for name, own in stage.called.items() if any(parameters[own] is q for q in group["params"])}
            every = [saved for section in state_dict.sections(state) for saved in section["optimizer"]["param_groups"]]
            for saved in every:
                if members & set(saved["params"]):
                    for option in own.keys() & saved.keys():
                        checks.alike(own[option], saved[option], f"the option {option!r}")
                        checks.expect(
                            own[option] is None or saved[option] is not None, f"the option {option!r} is None"
                        )
                    checks.warn_of_options(f"stage {stage.index}", own, saved)
    for section in state_dict.sections(state):
        checks.entries("the model", section["optimizer"]["state"], names)
    for name, value in state["model"].items():
        fits = not isinstance(shapes.get(name), torch.Size) or isinstance(value, torch.Tensor)
        checks.expect(fits, f"{name} is no tensor")
    write = state_dict.check_state(engine.stages, state, shapes, scheduler=scheduler)

    def put() -> None:
        for stage in engine.stages:
            stage.drop()
            stage.draws.seed = found.manifest["seed"]
        write()
        come_to_rest(engine, found.num_updates, found.manifest["next_microbatch"])

    return put


_COUNTED = {"num_stages": "stages", "num_replicas": "replicas", "num_microbatches": "micro-batches"}
_CHANGES_RESULTS = ("keep", "max_grad_norm", "clip")
_CHANGES_BITS = {
    "threads": "torch.set_num_threads() sets it",
    "torch": "install that one",
    "devices": "pass devices=",
    "compiled": "pass compile=",
}


def _exact(engine: Engine, found: Checkpoint, settings: dict[str, Any]) -> Callable[[], None]:
    from .tensors import read_tensors

    said = found.manifest
    advice = "make the pipeline with the same arguments, or save with portable=True to change them"
    for name, word in _COUNTED.items():
        if said[name] != settings[name]:
            raise CheckpointError(
                f"{found.folder} was saved with {said[name]} {word}, and this pipeline has {settings[name]}; {advice}"
            )
    for name, value in settings["method"].items():
        if said["method"].get(name) != value:
            raise CheckpointError(
                f"{found.folder} was saved by method {found.method!r} with {name}={said['method'].get(name)!r}, and this pipeline "
                f"has {settings['method']['name']!r} with {name}={value!r}; {advice}"
            )
    for k, (theirs, ours) in enumerate(zip(said["layers"], settings["layers"], strict=True)):
        if theirs != ours:
            raise CheckpointError(
                f"{found.folder} is another model's, or cut elsewhere: stage {k} has the layers {', '.join(theirs)} there and "
                f"{', '.join(ours)} here; {advice}"
            )
    for name in _CHANGES_RESULTS:
        if said[name] != settings[name]:
            raise CheckpointError(
                f"{found.folder} was saved with {name}={said[name]}, and this pipeline has {name}={settings[name]}; {advice}"
            )
    _warn_of_settings(said, settings)
    here = "local" if engine.alone else "distributed"
    for name, part in sorted(said["state"].items()):
        exact.check_form(f"stage {name}", part)
    own = engine.stages[0].method
    checks.in_flight(said, [lead(own, said["num_stages"], k) for k in range(said["num_stages"])])
    parts = []
    for stage in engine.stages:
        part, common = said["state"][f"{stage.index}.{stage.replica}"], said["state"][f"{stage.index}.0"]
        if part["predictor"] is not None and here != said["engine"]:
            raise CheckpointError(
                f"{found.folder} holds the state of a predictor in a {said['engine']} run, where each process has its own; load "
                "it in such a run, or save with portable=True"
            )
        parts.append((stage, part, common))
    keys = [key for _, part, common in parts for key in [*tensor_keys(part), *tensor_keys(_common(common))]]
    specs = {key: Spec(key, said["tensors"][key]) for key in keys}
    decoder = Decoder(read_tensors(found.folder, said["files"], specs), specs)
    ready = [exact.decode_stage(decoder, part, common, stage) for stage, part, common in parts]

    def put() -> None:
        for own in ready:
            own.put(said["seed"])
        engine.resume([own.progress for own in ready])

    return put


def _warn_of_settings(said: dict[str, Any], settings: dict[str, Any]) -> None:
    """Of what may be otherwise, if not for the bits."""
    now = {**settings, **_surroundings()}
    checks.expect(type(said["torch"]) is str and type(said["compiled"]) is bool, "its surroundings")
    checks.expect(isinstance(said["devices"], list) and {*map(type, said["devices"])} == {str}, "its devices")
    checks.expect(isinstance(said["on_nonfinite"], str), "its on_nonfinite")
    for name, cure in _CHANGES_BITS.items():
        if said[name] != now[name]:
            warnings.warn(
                f"the checkpoint was saved with {name}={said[name]}, and it is {now[name]} now, which can change the last "
                f"bits of what follows; {cure}",
                stacklevel=2,
            )
    if said["on_nonfinite"] != settings["on_nonfinite"]:
        warnings.warn(
            f"the checkpoint was saved with on_nonfinite={said['on_nonfinite']!r}, and this pipeline has "
            f"{settings['on_nonfinite']!r}: from here on a gradient that is not finite is treated otherwise",
            stacklevel=2,
        )


def _surroundings() -> dict[str, Any]:
    """What is not the pipeline's, and decides last bits all the same."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def _common(part: dict[str, Any]) -> list[Any]:
    """What the first replica writes for all."""
    return [part["parameters"], part["optimizer"], part["scheduler"]]


def settings_of(
    method: dict[str, Any],
    stages: list[tuple[Any, ...]],
    num_microbatches: int,
    seed: int,
    keep: Any,
    rule: GradientRule,
    compiled: bool,
) -> dict[str, Any]:
    """What must be the same to load an exact checkpoint, and how the pipeline was made.

    Args:
        method: its fields.
        stages: what `describe_stage` says of every stage.
        num_microbatches: of the pipeline.
        seed: of the pipeline.
        keep: of the pipeline.
        rule: of the pipeline, for gradients.
        compiled: whether the stages are.
    """
    replicas = max(replica for replica, _, _ in stages) + 1
    layers = [list(names) for replica, names, _ in stages if replica == 0]
    return {
        "method": method,
        "num_stages": len(layers),
        "num_replicas": replicas,
        "num_microbatches": num_microbatches,
        "layers": layers,
        "seed": seed,
        "keep": keep,
        "max_grad_norm": rule.max_norm,
        "clip": rule.clip,
        "on_nonfinite": rule.on_nonfinite,
        "compiled": compiled,
        "devices": [device for replica, _, device in stages if replica == 0],
    }


def describe_stage(stage: Stage) -> tuple[int, list[str], str]:
    """Its replica, the names of its layers, and the type of its device."""
    return stage.replica, [name for name, _ in stage.module.named_children()], stage.device.type
