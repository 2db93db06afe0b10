"""Runs a workflow once for each row of a table: `quickstart.py map`.

`rows` reads tables, `jobs` makes a workflow of each row and checks it, `results` keeps what is done, `worker` runs rows
and `batches` draws several of them in one pass. `command` does all of it on this machine, `ray_pool` on a cluster.
"""
