"""PyTorch: eager, eager with the fused Adam, or `torch.compile`.

The images are a float32 tensor that batches index, in channels_last for the CNN.
"""

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.peer_workers import job as jobs


def network(model: str) -> nn.Sequential:
    """The tutorial's network of that name."""
    layers: list[nn.Module] = []
    width = 28 * 28
    if model == "cnn":
        layers += [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(128, 256, 3), nn.ReLU(), nn.MaxPool2d(2)]
        width = 6 * 6 * 256
    layers.append(nn.Flatten())
    for size in jobs.HIDDEN_SIZES[model]:
        layers += [nn.Linear(width, size), nn.ReLU()]
        if model == "cnn":
            layers.append(nn.Dropout(jobs.DROPOUT))
        width = size
    return nn.Sequential(*layers, nn.Linear(width, jobs.NUM_CLASSES))


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """The network with `torch.optim.Adam`, used as the mode says."""
    data = data.as_float()
    # (n, 1, 28, 28): with one channel, the same bytes in either layout.
    image = torch.from_numpy(data.image).permute(0, 3, 1, 2)
    test_image = torch.from_numpy(data.test_image).permute(0, 3, 1, 2)
    label = torch.from_numpy(data.label).long()
    test_label = torch.from_numpy(data.test_label).long()
    net = network(job.model)
    if job.model == "cnn":
        net = net.to(memory_format=torch.channels_last)
    fused = {"fused": True} if job.mode == "eager, fused Adam" else {}
    tx = torch.optim.Adam(net.parameters(), lr=jobs.LEARNING_RATE, eps=jobs.EPSILON, **fused)
    apply = torch.compile(net) if job.mode == "torch.compile" else net
    loss_fn = nn.functional.cross_entropy
    done = 0

    def train(state: None, steps: int) -> None:
        nonlocal done
        net.train()
        for _ in range(steps):
            index = torch.from_numpy(data.batch_index(done, job.batch_size))
            tx.zero_grad()
            loss_fn(apply(image[index]), label[index]).backward()
            tx.step()
            done += 1

    def evaluate(state: None, batches: int) -> tuple[float, int]:
        net.eval()
        loss, correct = torch.zeros(()), torch.zeros((), dtype=torch.long)
        with torch.inference_mode():
            for i in range(batches):
                place = slice(i * jobs.EVAL_BATCH_SIZE, (i + 1) * jobs.EVAL_BATCH_SIZE)
                logits = apply(test_image[place])
                loss += loss_fn(logits, test_label[place], reduction="sum")
                correct += (logits.argmax(1) == test_label[place]).sum()
        return loss.item(), int(correct)

    return jobs.Workload(None, train, evaluate, lambda _: None, {"torch": torch.__version__})


if __name__ == "__main__":
    jobs.main(make)
