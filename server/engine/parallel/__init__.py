"""One engine over several processes: each holds a share of the base's layers, and of every variant's deltas.

Process 0 is the server: HTTP, registry, residency, scheduling and the choice of tokens are its alone (``team.py``). The
others only compute (``worker.py``): they are told what to load, which slot it goes to, and each step's inputs, in one
order. transformers would run a scheduler on every process; here no two can come to different conclusions.
"""
