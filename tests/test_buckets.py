"""Gradients averaged in buckets while backward runs: those of one message at its end, whatever a process used."""
import torch
import torch.multiprocessing as mp
from tiny import together

import train

WIDTH = 16                                               # a weight has 1 kB


def layers():
    """Five layers of which the first is frozen; every process has the same."""
    torch.manual_seed(0)
    net = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(5))
    net[0].requires_grad_(False)
    return net


def run(net, rank, step, portion):
    """A loss of a process that uses other layers in other steps; the fourth is used by nobody."""
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * rank + 10 * step + portion))
    x = net[1](net[0](x)).tanh()
    if rank == 1 and step != 1 and portion == 0:         # one process alone, and not in its last portion
        x = net[2](x)
    return net[4](x).square().sum()


def plain(rank, step, portions):
    """{name: gradient} of one process, accumulated, nothing averaged."""
    net = layers()
    for portion in range(portions):
        run(net, rank, step, portion).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def expected(step, portions):
    """The plain way, by one process: everything is there, then the mean; what nobody has stays without."""
    of = [plain(rank, step, portions) for rank in (0, 1)]
    return {name: None if a is None and b is None else sum(x for x in (a, b) if x is not None) / 2
            for (name, a), b in zip(of[0].items(), of[1].values())}


CASES = [(1100, 1), (1100, 2), (2500, 2), (10 ** 6, 1)]  # bytes of a message, portions of a step


def steps(rank, world, path):
    together(rank, world, path)
    found = {}
    for size, portions in CASES:
        train.Buckets.BYTES, net = size, layers()
        buckets = train.Buckets(net.parameters(), world)
        for step in range(4):
            for portion in range(portions):
                if portion == portions - 1:
                    buckets.start()
                run(net, rank, step, portion).backward()
            buckets.finish()
            found[size, portions, step] = {name: p.grad for name, p in net.named_parameters()}
            net.zero_grad()
    torch.save(found, f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_mean_to_the_bit_and_parameters_that_nobody_used_have_none(tmp_path):
    mp.spawn(steps, (2, tmp_path / "found"), nprocs=2)
    for rank in (0, 1):
        for (size, portions, step), found in torch.load(f"{tmp_path / 'found'}.{rank}").items():
            for name, mean in expected(step, portions).items():
                assert mean is None if found[name] is None else torch.equal(found[name], mean), (rank, size, step, name)
            assert found["0.weight"] is found["3.weight"] is None and (found["2.weight"] is None) == (step == 1)


class Alone:
    """Stands for torch.distributed: two processes that have the same gradients. Notes every message."""

    def __init__(self, monkeypatch):
        self.messages, self.waited = [], 0
        monkeypatch.setattr(train, "dist", self)

    def all_reduce(self, flat, async_op):
        assert async_op
        self.messages.append(flat.mul_(2))
        return self

    def wait(self):
        self.waited += 1


def test_messages_leave_while_backward_still_runs_and_a_gradient_is_held_once(monkeypatch):
    world = Alone(monkeypatch)
    monkeypatch.setattr(train.Buckets, "BYTES", 1100)
    net = layers().requires_grad_()
    buckets, sent = train.Buckets(net.parameters(), 2), []

    def loss():
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
        for layer in net:
            x = layer(x)
            x.register_hook(lambda g: sent.append(len(world.messages)))
        return x.square().sum()
    loss().backward()                                    # not started: accumulation sends nothing
    assert not world.messages
    net.zero_grad()
    plain = torch.autograd.grad(loss(), [*net.parameters()])
    del sent[:]
    buckets.start()
    loss().backward()
    assert sent == [0, 1, 2, 3, 4] and len(world.messages) == 5 and not world.waited
    buckets.finish()
    assert world.waited == 5 and max(flat.nbytes for flat in world.messages) < 1200
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), plain))
    memory = {flat.untyped_storage().data_ptr() for flat in world.messages}
    assert {p.grad.untyped_storage().data_ptr() for p in net.parameters()} == memory


def test_idle_parameters_hold_up_one_step_and_no_other(monkeypatch):
    world = Alone(monkeypatch)
    monkeypatch.setattr(train.Buckets, "BYTES", 1100)
    net, during = layers(), []                           # the fourth layer is idle, the third as well: this is rank 0
    buckets = train.Buckets(net.parameters(), 2)
    for step in range(3):
        del world.messages[:]
        buckets.start()
        run(net, 0, step, 0).backward()
        during.append(len(world.messages))
        buckets.finish()
        assert sum(flat.numel() for flat in world.messages) == sum(p.numel() + 1 for p in net.parameters() if p.requires_grad)
        net.zero_grad()
    assert during == [1, 2, 2]                           # behind the last layer nothing may leave before the idle ones


def test_one_process_sends_nothing_and_has_no_hooks(monkeypatch):
    world, net = Alone(monkeypatch), layers()
    train.Buckets(net.parameters(), 1)
    run(net, 0, 0, 0).backward()
    assert not world.messages and all(not p._post_accumulate_grad_hooks for p in net.parameters())


def test_a_parameter_larger_than_a_bucket_travels_alone(monkeypatch):
    monkeypatch.setattr(train.Buckets, "BYTES", 500)
    net = layers()
    assert [len(bucket) for bucket in train.Buckets(net.parameters(), 2).buckets] == [1] * 8
