"""The course's ClientApp: a client that trains on its own pictures as it is told. Needs Flower."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .course import album_of, model_of
from .local import LocalTraining, train_locally

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: load what was sent, train, send the weights back.

    The node's configuration says which victims the client holds (``victims``), its ``name``, and
    where it trains otherwise than it is told (``local-steps``, ``momentum``, …); these it says in
    its reply, as a cross-device client reports what it did.
    """
    node = context.node_config
    told = dict(message.content["config"])
    how = LocalTraining.from_config({**told, **node})
    model = model_of(context.run_config)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    album = album_of(str(node["victims"]), context.run_config)
    start = time.perf_counter()
    state = train_locally(model, album.images, album.labels, how)
    seconds = time.perf_counter() - start
    otherwise = {key: value for key, value in how.to_config().items() if told.get(key) != value}
    content = RecordDict(
        {
            "arrays": ArrayRecord(state),
            "metrics": MetricRecord({"num-examples": len(album.names), "seconds": seconds}),
            "client": ConfigRecord({"name": str(node["name"]), **otherwise}),
        }
    )
    return Message(content=content, reply_to=message)
