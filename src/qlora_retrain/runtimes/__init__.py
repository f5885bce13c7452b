"""What runs the steps: the only place in the library that may import Airflow or kfp.

`airflow_local` (a step as a subprocess of an Airflow task), `embedded` (a whole Airflow on loopback), `demo` and `ui`
(programs over it), `rest` (a client of Airflow's REST API), `form` (a run's form), `leash` (ends what it started).
"""
