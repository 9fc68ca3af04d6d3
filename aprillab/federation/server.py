"""The course's ServerApp: FedAvg, watched. Needs Flower."""

from __future__ import annotations

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
    clients = int(config["clients"])
    fedavg = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy = CuriousServer(fedavg, str(config["recording"]))
    strategy.start(
        grid,
        ArrayRecord(model_of(config).state_dict()),
        num_rounds=int(config["rounds"]),
        timeout=float(config["round-timeout"]),
        train_config=ConfigRecord(dict(LocalTraining.from_config(config).to_config())),
    )
