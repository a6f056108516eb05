"""PyTorch: eager, `torch.compile`, or the whole training step in one CUDA graph.

All have the fused Adam, images on the device, and for the CNN channels_last. A graph replays
gather, forward, backward and update, `UNROLL` steps at once, from static buffers.
"""

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.workers import job as jobs

UNROLL = 20  # steps a graph: between two replays the device waits for the host
WARMUP_STEPS = 11  # before the capture cuDNN tries its algorithms and Adam makes its state


def network(model: str) -> nn.Sequential:
    """The tutorial's network of that name."""
    layers, width = list[nn.Module](), 28 * 28
    if model == "cnn":
        layers += [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        layers += [nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(128, 256, 3), nn.MaxPool2d(2), nn.ReLU()]
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
    torch.set_flush_denormal(True)  # as XLA: random labels kill ReLUs, and Adam's moments decay
    on_gpu = job.platform == "gpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    context: dict[str, str] = {"torch": torch.__version__}
    if on_gpu:
        context |= {"torch_cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        torch.backends.cudnn.benchmark = True
        tf32 = job.precision == "tf32"  # cuDNN rounds factors to TF32 by default, cuBLAS does not
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    data = data.as_float()
    # (n, 1, 28, 28): with one channel, the same bytes in either layout.
    image = torch.from_numpy(data.image).permute(0, 3, 1, 2).to(device)
    label, order = (torch.from_numpy(x).long().to(device) for x in (data.label, data.order))
    net = network(job.model).to(device)
    if job.model == "cnn":
        net = net.to(memory_format=torch.channels_last)
    graph_mode = job.mode in (jobs.GRAPH, jobs.COMPILED_GRAPH)
    rates = {"lr": jobs.LEARNING_RATE, "eps": jobs.EPSILON}
    tx = torch.optim.Adam(net.parameters(), **rates, fused=True, capturable=graph_mode)

    def loss_of(image: Any, label: Any) -> Any:
        half = job.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            logits = net(image)
        return nn.functional.cross_entropy(logits.float(), label)

    # The mode's own graphs of forward and backward, unless the whole step becomes one.
    how = "reduce-overhead" if on_gpu and not graph_mode else None
    is_compiled = job.mode in (jobs.COMPILED, jobs.COMPILED_GRAPH)
    loss_fn = torch.compile(loss_of, mode=how) if is_compiled else loss_of

    def step(index: Any) -> None:
        tx.zero_grad(set_to_none=True)
        loss_fn(image[index], label[index]).backward()
        tx.step()

    size, batches, done = job.batch_size, len(order) // job.batch_size, 0

    def train(state: None, steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            first = done % batches * size
            step(order[first : first + size])
            done += 1

    sync = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    run, unit = (capture(step, order, size, batches), UNROLL) if graph_mode else (train, 1)
    return jobs.Workload(train=run, sync=sync, context=context, unit=unit)


def capture(step: Callable[[Any], None], order: Any, size: int, batches: int) -> Any:
    """`train` as replays of a CUDA graph of `UNROLL` steps, each on the next batch."""
    place = torch.zeros(1, dtype=torch.long, device=order.device)
    rows = torch.arange(size, device=order.device)

    def next_step() -> None:
        step(order[place + rows])
        place.add_(size).remainder_(batches * size)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_STEPS):
            next_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(UNROLL):
            next_step()

    def train(state: None, steps: int) -> None:
        for _ in range(steps // UNROLL):
            graph.replay()

    return train
