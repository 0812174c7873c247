"""A model into stages (`dtrp.split`).

`stages` cuts a Sequential or a list; for a model of any forward `export` traces it, `points` chooses where stages begin,
`divide` cuts the trace, and `traced_stage` is the module that runs a part.
"""
