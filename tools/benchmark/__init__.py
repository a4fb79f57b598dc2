"""Compare models, forms of them and runtimes on this machine.

`__main__` is the command line, `experiments` its commands, on the sides of
`models`; `report` shows results; `data.yml` has models and goals.
"""
