"""A model of any forward, traced and divided into stages (`dtrp.split`).

`export` traces it, `points` chooses where stages begin, `divide` cuts the trace and says what passes between the
parts, and `stage` is the module that runs a part.
"""
