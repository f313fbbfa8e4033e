"""What a call costs above the forward pass when the arithmetic is next to nothing."""

from . import peers, timing, workloads

WORKLOADS = workloads.OVERHEAD


def test_overhead(case, timed, benchmark, device):
    """Time one contender on a tiny MLP, then interleaved with the forward pass."""
    workload, peer = case
    call = timed(workload, peer)
    if peer.kind == "reference" or benchmark.stats is None:
        return
    forward = peers.contender(workload, peers.FORWARD, device.device, device.synchronize)
    calls = {"call": call, "forward": forward}
    estimate = dict.fromkeys(calls, benchmark.stats.stats.median)
    table = timing.interleave(calls, estimate, rounds=51, budget=5.0)
    above = table.paired("call", "forward", lambda a, b: a - b)
    benchmark.extra_info["above_forward_us"] = {
        "median": round(1e6 * above.median, 1),
        "p20": round(1e6 * above.p20, 1),
        "p80": round(1e6 * above.p80, 1),
    }
