"""The client's side."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart import task

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    model = task.net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader, _ = task.load_data(context.node_config["partition-id"], context.run_config["batch-size"])
    loss = task.train(model, loader, context.run_config["local-epochs"], msg.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    model = task.net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, loader = task.load_data(context.node_config["partition-id"], context.run_config["batch-size"])
    loss, accuracy = task.test(model, loader)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
