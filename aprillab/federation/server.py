"""The course's ServerApp: FedAvg, watched. Needs Flower."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from .course import model_of
from .curious import CuriousServer
from .local import LocalTraining

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that the run's configuration asks for, and record them in the folder it names."""
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["clients"]):
        time.sleep(0.2)
    # From here on with whoever is there: a client that dies does not stop the others.
    fedavg = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    strategy = CuriousServer(fedavg, str(config["recording"]))
    strategy.start(
        grid,
        ArrayRecord(model_of(config).state_dict()),
        num_rounds=int(config["rounds"]),
        timeout=float(config["round-timeout"]),
        train_config=ConfigRecord(dict(LocalTraining.from_config(config).to_config())),
    )
