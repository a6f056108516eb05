"""PyTorch: eager, eager with the fused Adam, or `torch.compile`; on a CPU, or all of it on a GPU.

The images are a float32 tensor that batches index, in channels_last for the CNN. On a GPU the
compiled modes replay CUDA graphs and take the fused Adam, and cuDNN tries its algorithms.
"""

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.peer_workers import job as jobs

# What `torch.compile` is told, by the mode's name.
COMPILED = {
    "torch.compile": None,
    "torch.compile, CUDA graphs": "reduce-overhead",
    "torch.compile, max-autotune": "max-autotune",
}


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


def set_precision(precision: str) -> None:
    """Lets a GPU round the factors of float32 products to TF32, or not; cuDNN does by default."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """The network with `torch.optim.Adam`, used as the mode says."""
    on_gpu = job.platform == "gpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    context: dict[str, str] = {"torch": torch.__version__}
    order = torch.from_numpy(data.order).to(device)
    if on_gpu:
        context["torch_device"] = torch.cuda.get_device_name()
        torch.backends.cudnn.benchmark = True
        set_precision(job.precision)
        order = order.long()  # or it would be converted in every step
    data = data.as_float()._replace(order=order)
    # (n, 1, 28, 28): with one channel, the same bytes in either layout.
    image = torch.from_numpy(data.image).permute(0, 3, 1, 2).to(device)
    test_image = torch.from_numpy(data.test_image).permute(0, 3, 1, 2).to(device)
    label = torch.from_numpy(data.label).long().to(device)
    test_label = torch.from_numpy(data.test_label).long().to(device)
    net = network(job.model).to(device)
    if job.model == "cnn":
        net = net.to(memory_format=torch.channels_last)
    compiled = job.mode in COMPILED
    fused = {"fused": True} if "fused" in job.mode or (compiled and on_gpu) else {}
    tx = torch.optim.Adam(net.parameters(), lr=jobs.LEARNING_RATE, eps=jobs.EPSILON, **fused)
    apply = torch.compile(net, mode=COMPILED[job.mode]) if compiled else net
    if job.precision == "bfloat16":
        apply = in_bfloat16(apply, device.type)
    loss_fn = nn.functional.cross_entropy
    done = 0

    def train(state: None, steps: int) -> None:
        nonlocal done
        net.train()
        for _ in range(steps):
            index = data.batch_index(done, job.batch_size)
            tx.zero_grad()
            loss_fn(apply(image[index]), label[index]).backward()
            tx.step()
            done += 1

    def evaluate(state: None, batches: int) -> tuple[float, int]:
        net.eval()
        loss = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.long, device=device)
        with torch.inference_mode():
            for i in range(batches):
                place = slice(i * jobs.EVAL_BATCH_SIZE, (i + 1) * jobs.EVAL_BATCH_SIZE)
                logits = apply(test_image[place])
                loss += loss_fn(logits, test_label[place], reduction="sum")
                correct += (logits.argmax(1) == test_label[place]).sum()
        return loss.item(), int(correct)

    def sync(_: object) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    return jobs.Workload(None, train, evaluate, sync, context)


def in_bfloat16(apply: Callable[[Any], Any], device: str) -> Callable[[Any], Any]:
    """Computes the layers in bfloat16, as `autocast` does; parameters and logits stay float32."""

    def call(image: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            logits = apply(image)
        return logits.float()

    return call


if __name__ == "__main__":
    jobs.main(make)
