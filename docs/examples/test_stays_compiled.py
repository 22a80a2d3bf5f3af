"""Is it compiled, and does it stay so? The test fails, on purpose: the model counts its steps in Python."""

import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return self.linear(x) * min(1.0, self.steps / 100)


def test_it_stays_compiled(compile_monitor):
    with compile_monitor() as monitor:
        model = torch.compile(Model(), dynamic=False, backend="eager")
        for step in range(12):
            monitor.step(step)
            model(torch.ones(4, 32)).sum().backward()
    assert monitor.is_compiled(), str(monitor)
