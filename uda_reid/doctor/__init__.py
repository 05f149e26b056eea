"""What `cli.py doctor` reports of a machine, and the checks of `doctor --run`.

`environment`, `devices` and `data_sets` collect facts, `findings` says what is wrong with them. `checks` lists what
`--run` tries on a device; each check compares the product with a plain form (`plain`, `plain_losses`) on the CPU.
"""
