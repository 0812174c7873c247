"""Defects of one line, each with the test that must fail on it: they show that the numeric tests look.

`tests/test_mutants.py` runs them (`make mutants`). A line that has been rewritten is no longer found, and that is a failure too:
then the mutant is written anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A defect.

    Args:
        name: what is wrong with the library then.
        path: the file, from ``dtrp/`` on.
        line: text that stands once in the file.
        mutated: the text in its place.
        test: the test, or a part of its parametrization, as pytest is told it.
    """

    name: str
    path: str
    line: str
    mutated: str
    test: str


EVERY_METHOD = "tests/test_pipeline.py::test_every_method_equals_its_equations"
PERFECT = "tests/test_pipeline.py::test_with_perfect_prediction_it_is_backpropagation_to_the_bit"
MUTANTS = [
    Mutant(
        "the lead is one short",
        "schedule.py",
        "return math.ceil(order.ahead * (num_stages - 1 - stage) - 1e-9)",
        "return math.ceil(order.ahead * (num_stages - 1 - stage) - 1e-9) - 1",
        "tests/test_schedule.py::test_golden_dtrp",
    ),
    Mutant(
        "a gradient is one slot late",
        "schedule.py",
        "elif microbatch >= self.next_backward",
        "elif microbatch > self.next_backward",
        "tests/test_schedule.py::test_golden_dtrp",
    ),
    Mutant(
        "U comes one backward too early",
        "schedule.py",
        "        if self._left[0]:\n            return ()",
        "        if self._left[0] > 1:\n            return ()",
        "tests/test_schedule.py::test_golden_bp",
    ),
    Mutant(
        "a micro-batch may have one sample",
        "schedule.py",
        "num_samples // microbatch_samples",
        "num_samples",
        "tests/engine/test_default_parts.py::test_bp_is_a_plain_loop_over_the_same_parts",
    ),
    Mutant(
        "a checkpoint's rule for small mini-batches is read and not followed",
        "engine/base.py",
        "self._num_microbatches, self._microbatch_samples = num_microbatches, microbatch_samples",
        "self._num_microbatches = num_microbatches",
        "tests/engine/test_default_parts.py::test_a_run_that_goes_on_cuts_small_minibatches_as_before",
    ),
    Mutant(
        "the formula of the delay forgets the place in the mini-batch",
        "schedule.py",
        "math.ceil((lag(order, num_stages, stage) - position) / num_microbatches)",
        "math.ceil(lag(order, num_stages, stage) / num_microbatches)",
        "tests/test_pipeline.py::test_counted_delays_are_those_of_the_formula",
    ),
    Mutant(
        "a deadlock is not seen",
        "schedule_grid.py",
        "self._when.get((source, action), latest + 1) <= latest",
        "self._when.get((source, action), latest) <= latest",
        "tests/test_schedule.py::test_a_broken_schedule_is_refused_with_the_cell_marked",
    ),
    Mutant(
        "no W fills the bubble before the last forward",
        "schedule.py",
        "if self.next_forward - self.next_weights >= self.num_stages:",
        "if self.next_forward - self.next_weights > self.num_stages:",
        "tests/test_split_backward.py::test_the_bubble_of_zero_bubble",
    ),
    Mutant(
        "the learned length of a prediction forgets nothing",
        "predict/stateful.py",
        "new + self._decay * old, old) for",
        "new + old, old) for",
        "tests/test_predict_with_state.py::test_scaled_is_the_fit_of_its_equation",
    ),
    Mutant(
        "linear looks one update too far",
        "predict/built_in.py",
        'alpha=-horizon * float(of.group["lr"])',
        'alpha=-(horizon + 1) * float(of.group["lr"])',
        "tests/test_predict.py::test_linear_is_the_last_step_over_and_over",
    ),
    Mutant(
        "the roll-out of SGD leaves its weight decay out",
        "predict/built_in.py",
        "gp, gv = decay * pp, decay * pv",
        "gp, gv = 0.0, 0.0",
        "tests/test_predict.py::test_rollout_is_the_optimizer_with_zero_gradients",
    ),
    Mutant(
        "the roll-out of Adam corrects its moments for one step too few",
        "predict/built_in.py",
        "foreach.mul(v, _each(left[1] / (1 - beta2 ** (t + i))))",
        "foreach.mul(v, _each(left[1] / (1 - beta2 ** (t + i - 1))))",
        "tests/test_predict.py::test_rollout_is_the_optimizer_with_zero_gradients",
    ),
    Mutant(
        "informed takes the known gradient for the whole one",
        "predict/built_in.py",
        'v = foreach.mul(state["momentum_buffer"], 1 - share * (1 - group["momentum"]))',
        'v = foreach.mul(state["momentum_buffer"], group["momentum"])',
        "tests/test_predict.py::test_informed_is_linear_after_the_gradient_that_is_known",
    ),
    Mutant(
        "Muon's filters are not flattened over all but the first dimension",
        "optim/muon.py",
        "matrix.grad = p.grad.flatten(1)",
        "matrix.grad = p.grad.flatten(1).flip(1)",
        "tests/optim/test_optim.py::test_muon_is_torchs_on_flattened_weights",
    ),
    Mutant(
        "an extrapolated update forgets the one before",
        "optim/extrapolation.py",
        ".add_(last, alpha=c)",
        "",
        "tests/optim/test_optim.py::test_an_extrapolated_update_goes_along_its_change",
    ),
    Mutant(
        "spectrain does not predict",
        "methods.py",
        'Method("spectrain", 1, False, "graph", "stashed", "linear")',
        'Method("spectrain", 1, False, "graph", "stashed")',
        "tests/test_methods.py::test_the_rows_are_those_of_the_equations",
    ),
    Mutant(
        "a stashed backward runs at the present weights",
        "stage/stage.py",
        'if not self.recomputes or self.method.backward_at == "stashed":',
        "if not self.recomputes:",
        "tests/test_pipeline.py::test_every_field_of_a_row_equals_its_equations",
    ),
    Mutant(
        "a stage shrinks no gradient that it receives",
        "stage/stage.py",
        "gradient = gradient * self.method.grad_shrink",
        "gradient = gradient * 1.0",
        "tests/test_pipeline.py::test_every_field_of_a_row_equals_its_equations",
    ),
    Mutant(
        "the learning rate shrinks once, whatever the distance",
        "stage/stage.py",
        "lr_factor=self.method.lr_shrink**self.distance",
        "lr_factor=self.method.lr_shrink",
        "tests/test_pipeline.py::test_every_field_of_a_row_equals_its_equations",
    ),
    Mutant(
        "a loss is weighted by parts, not by samples",
        "engine/local.py",
        "num_samples(part) / samples, share)",
        "1 / parts, share)",
        "tests/test_pipeline.py::test_a_step_returns_the_sample_weighted_mean_loss",
    ),
    Mutant(
        "a prediction is one update short",
        "stage/weight_versions.py",
        "self.predictor(self._parameters, self._optimizer, horizon, out.tensors",
        "self.predictor(self._parameters, self._optimizer, max(1, horizon - 1), out.tensors",
        EVERY_METHOD,
    ),
    Mutant(
        "a prediction is kept for the next version",
        "stage/weight_versions.py",
        "if self._buffered != (version, horizon) or not self.alike:",
        "if self._buffered is None or not self.alike:",
        EVERY_METHOD,
    ),
    Mutant(
        "a predictor is told a later version",
        "stage/weight_versions.py",
        '"microbatch": microbatch, "version": version}',
        '"microbatch": microbatch, "version": version + 1}',
        PERFECT,
    ),
    Mutant(
        "micro-batches draw the same numbers",
        "tensors/rng.py",
        'packed = struct.pack("<4q", seed, replica, stage, microbatch)',
        'packed = struct.pack("<4q", seed, replica, stage, 0)',
        "tests/test_pipeline.py::test_dropout_draws_by_stage_and_microbatch",
    ),
    Mutant(
        "a term of a stage does not count as its micro-batch",
        "stage/stage.py",
        "starts.append(torch.full_like(held.added, held.micro.factor))",
        "starts.append(torch.ones_like(held.added))",
        "tests/stage/test_added_losses.py::test_bp_trains_as_the_plain_loop",
    ),
    Mutant(
        "the loss of a micro-batch of no weight is used",
        "stage/stage.py",
        "if held.micro.factor == 0:\n            return self._no_gradient(held)",
        "if False:\n            return self._no_gradient(held)",
        "tests/engine/test_loss_weights.py",
    ),
    Mutant(
        "a tied gradient is taken from one stage",
        "stage/stage.py",
        "self.gradients[self.index_of(tie)] = functools.reduce(torch.add, present) if present else None",
        "self.gradients[self.index_of(tie)] = present[0] if present else None",
        "tests/stage/test_ties.py::test_they_train_as_in_the_unsplit_model",
    ),
    Mutant(
        "the norm of all stages is the largest",
        "stage/gradients.py",
        "math.hypot(*norms)",
        "max(norms)",
        "tests/stage/test_gradients.py::test_global_clips_as_the_unsplit_model",
    ),
    Mutant(
        "replicas are averaged, whatever their samples",
        "comm/gradient_averaging.py",
        "share = weight / all_weights if all_weights else math.nan",
        "share = 1 / 2",
        "tests/engine/test_distributed.py::test_replicas_equal_one_process_with_their_shards_put_together",
    ),
    Mutant(
        "a slow link is free in the simulator",
        "planning/simulate.py",
        "                if arrived > clock:\n                    clock = arrived",
        "                if arrived > clock + 1e9:\n                    clock = arrived",
        "tests/planning/test_planning.py::test_what_a_lead_buys",
    ),
    Mutant(
        "a stage that decides for itself goes one forward past its cap",
        "planning/orders/greedy.py",
        "self.forwards - self.weights <= self.cap:",
        "self.forwards - self.weights <= self.cap + 1:",
        "tests/planning/test_orders.py::test_a_cycle_that_is_read_is_the_order_of_the_run",
    ),
    Mutant(
        "the delay of an order is counted up to I, before the update",
        "planning/orders/cycles.py",
        'done.count("F") - done.count("W")',
        'done.count("F") - done.count("I")',
        "tests/planning/test_orders.py::test_what_counts_for_the_delay_is_whether_the_update_comes_before_the_forward",
    ),
    Mutant(
        "a sampler forgets where it was",
        "data/sampler.py",
        "yield from order[self.position :]",
        "yield from order",
        "tests/saving/test_saving.py::test_a_resumed_sampler_sees_what_was_left",
    ),
    Mutant(
        "a checkpoint forgets the number of micro-batches",
        "saving/exact.py",
        '"next_microbatch": progress.next_microbatch,',
        '"next_microbatch": 0,',
        "tests/saving/test_saving.py::test_an_exact_checkpoint_goes_on_to_the_bit",
    ),
    Mutant(
        "W adds up the uses of a weight one by one",
        "stage/deferral/division.py",
        "        total = gradient if before is None else before + gradient",
        "        total = gradient",
        "tests/stage/test_deferral.py::test_both_parts_are_one_backward_to_the_bit",
    ),
    Mutant(
        "what autograd gives a weight beside the queue is lost",
        "stage/deferral/division.py",
        "        queue.parts = {i: part for i, part in parts.items() if part is not None}",
        "        queue.parts = {}",
        "tests/stage/test_deferral.py::test_a_later_use_in_another_way_is_right_or_refused",
    ),
    Mutant(
        "the first gradient is laid out as it came",
        "stage/deferral/accumulation.py",
        "    elif _laid_out_alike(gradient, leaf):",
        "    elif leaf.shape:",
        "tests/stage/test_deferral.py::test_gradients_are_laid_out_as_autograd_lays_them",
    ),
    Mutant(
        "what a sample draws does not know the epoch",
        "data/supplied/samples.py",
        '"sample", self._seed, wanted.split, wanted.epoch, index',
        '"sample", self._seed, wanted.split, 0, index',
        "tests/data/test_supplied.py::test_any_number_of_workers_reads_the_same",
    ),
    Mutant(
        "all samples draw alike",
        "data/supplied/samples.py",
        '"sample", self._seed, wanted.split, wanted.epoch, index',
        '"sample", self._seed, wanted.split, wanted.epoch',
        "tests/data/test_supplied.py::test_any_number_of_workers_reads_the_same",
    ),
    Mutant(
        "an epoch that is taken up begins anew",
        "data/supplied/supplied.py",
        "torch.split(order[start:], batch_size)",
        "torch.split(order, batch_size)",
        "tests/data/test_supplied.py::test_parts_of_an_epoch",
    ),
    Mutant(
        "reading moves the generators of the run",
        "data/supplied/samples.py",
        "        _set_generators(before)",
        "        pass",
        "tests/data/test_supplied.py::test_the_generators_of_the_run_are_left_alone",
    ),
    Mutant(
        "five are four",
        "train/scores/criterion.py",
        "min(5, logits",
        "min(4, logits",
        "tests/train/test_own_data.py::test_top_5_is_told_from_a_hundred_classes_on",
    ),
    Mutant(
        "a test weighs its mini-batches alike",
        "train/scores/criterion.py",
        "(before[0] + total, before[1] + count)",
        "(before[0] + total / max(1.0, count), before[1] + 1)",
        "tests/train/test_own_data.py::test_bp_trains_on_it_as_a_plain_loop_does",
    ),
    Mutant(
        "the lowest is never the best",
        "train/trainer.py",
        "sign * metrics.test_accuracy > sign * best[1]",
        "metrics.test_accuracy > best[1]",
        "tests/train/test_own_data.py::test_a_loss_and_metrics_of_the_users",
    ),
    Mutant(
        "a level counts as reached at the test after it",
        "train/scores/samples_needed.py",
        "return samples[i - 1] + (samples[i] - samples[i - 1]) * (before - level) / (before - value)",
        "return float(samples[i])",
        "tests/train/test_samples_needed.py::test_the_first_crossing",
    ),
    Mutant(
        "the samples of each seed are those over the mean of the baseline",
        "train/scores/samples_needed.py",
        "ratio(values, twins[seed])[1]",
        "ratio(values, base)[1]",
        "tests/train/test_samples_needed.py::test_over_several_seeds",
    ),
    Mutant(
        "the spread of a difference is that of one method alone",
        "report/opening.py",
        "for values in (self.values, self.base)))",
        "for values in (self.values,)))",
        "tests/report/test_opening.py::test_the_verdict",
    ),
]
