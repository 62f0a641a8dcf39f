"""`fedsplit sweep`: a grid over any keys with seeds, a run folder each, and one table.

study.py     the study file: configs, keys, arms, grid, seeds; what runs it asks for
folders.py   what is there of a run; whether one can begin
work.py      one run in its own process: train, or go on; audit
pool.py      processes of this machine
cluster.py   tasks of a Ray cluster
conduct.py   all of it: check, run, rewrite the table
table.py     sweep.csv, sweep.parquet, means over seeds
"""
