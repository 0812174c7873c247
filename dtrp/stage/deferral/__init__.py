"""A stage's backward in two parts: I, the gradient of its input, and W, the gradients of its weights, later.

Each use of a weight in a linear map, a matrix product, a convolution or an embedding is recorded as one node of the graph
that knows the gradient of its input, and queues the rest::

    with division.recording(leaves):                  R (or F, where its graph is kept)
        out = module(x)
    queue = division.input_backward(edges, grads, leaves)     I   instead of torch.autograd.backward(edges, grads)
    queue.run()                                               W

After both, ``.grad`` of the leaves is to the bit what one backward would have made of it (hooks of parameters
included, which are called where the last part of their gradient is there). What cannot be divided (norms, LSTM,
einsum) has its gradient after I. Before the first of all, `Division.trial` tries it, and leaves whole what is not
equal.
"""

from .deferring import defer, receiving
from .division import Division, Queue
from .trying import Share, Tried

__all__ = ["Division", "Queue", "Share", "Tried", "defer", "receiving"]
