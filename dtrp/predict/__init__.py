"""Weight prediction: the weights that an optimizer would reach some updates ahead.

A forward that runs ``delay`` updates before its backward reads, instead of the weights of now, those
predicted for then. A predictor is any object that is called as ::

    predictor(parameters, optimizer, horizon, out, *, stage, microbatch, version)

and writes into the tensors ``out`` (shapes, dtypes and devices of ``parameters``) the weights that
``optimizer`` would give ``parameters`` in ``horizon`` updates, gradients unknown. It touches nothing
else. ``parameters`` are the stage's trainable ones in the order of ``named_parameters()``, ``version``
the number of their updates so far; the learning rates it finds in ``optimizer.param_groups`` are those
of the stage's next update, ``lr_shrink`` included. It is called once per micro-batch and never with a
horizon of 0.

Six are built in. With p a weight, v its momentum buffer, mu the momentum and h the horizon:

``linear``
    The last update h times over (SpecTrain, arXiv:1809.02839).
    SGD ``p - h lr v``; Adam ``p - h lr m_hat / (sqrt(v_hat) + eps)``, AdamW with its decay in the step.
``rollout``
    The optimizer run h times with a zero gradient, weight decay included (the roll-out of FTPipe's
    momentum prediction, USENIX ATC 2021). SGD without decay: ``p - lr v (mu + mu^2 + ... + mu^h)``.
``informed``
    ``linear``, from a momentum that counts what is known of the next gradient. When a micro-batch's
    forward runs, some of those of the preceding mini-batch have often had their backward; with s
    their share of its samples, a their gradient so far, and g the mean gradient that a momentum stands
    for, the next gradient is taken to be ``a + (1 - s) g``. Ours. It is another prediction for each micro-batch,
    so it costs a pass each, with scratch of up to five weights. ::

        SGD     v becomes  mu v + (1 - dampening) (a + (1 - s) g),     g = v (1 - mu) / (1 - dampening)
        Adam    m becomes  beta1 m + (1 - beta1) (a + (1 - s) g),      g = m_hat; v likewise, with its square

``last``
    ``p + h (p - p_before)``: the last update h times over, whatever made it, so that any optimizer is known. Where the
    learning rate changes, the update is scaled by the next rate over the last, group by group. It costs one copy of the
    weights. Ours.
``scaled``
    `Scaled` of ``rollout``: the length of its displacement is learned while it runs. Ours.
``auto``
    `Scaled` of ``linear`` where the optimizer's rule is known and there is a momentum, and of ``last`` elsewhere.

The first three, and so their scaled forms, leave a weight as it is while its optimizer holds no state for it: before its
first update, and for SGD without momentum; ``last`` while there has been no update.

A predictor that the user writes is told the gradient too if it has an attribute ``uses_gradients`` that is
true: it is then called with ``gradients=`` (those of mini-batch ``version`` so far, summed over its
micro-batches, each weighted by its share; None where there is none; not to be written) and ``share=``
(of its samples, from 0 to 1), and on ranks the prediction is not made ahead of its time.
"""

from .built_in import BuiltInPredictor, Predictor, informed, linear, register, rollout
from .stateful import (
    Last,
    Scaled,
    StagePredictor,
    StatefulPredictor,
    as_predictor,
    auto,
    is_alike,
    last,
    stage_predictor,
)

__all__ = [
    "BuiltInPredictor",
    "Last",
    "Predictor",
    "Scaled",
    "StagePredictor",
    "StatefulPredictor",
    "as_predictor",
    "auto",
    "informed",
    "is_alike",
    "last",
    "linear",
    "register",
    "rollout",
    "stage_predictor",
]
