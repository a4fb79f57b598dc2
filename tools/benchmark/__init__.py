"""Compare models, forms of them and runtimes on this machine.

`__main__` is the command line; `experiments` has a function for each of its
commands, on the sides of `models`; `report` shows the results. `data.yml` are
models and goals.
"""
