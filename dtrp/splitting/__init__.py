"""Cut a model into stages (`dtrp.split`).

`stages` cuts an `nn.Sequential` or a list between its modules. For any other model `export` traces the forward,
`points` chooses where stages begin, `divide` cuts the trace, and `traced_stage` has the module that runs a part.
"""
