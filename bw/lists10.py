"""Lists at 16k: forward and backward with 50, 75 and 90 % of visible blocks skipped, against our dense one, in turns."""
import sys, time, functools
sys.path[:0] = ["bw", "benchmarks", "tests/kernels", "tests"]
import torch
MODE = sys.argv[1] if __name__ == "__main__" else "none"
B = sys.modules["__main__"] if MODE == "none" else __import__("bench10")
import attention as A, skip as K
from modelopt_lite.kernels import KeyBlocks, choice, portable, hopper_backward_launch as hbl
from modelopt_lite.plan import DENSE
from modelopt_lite.kernels.top_n import top_n_plan
say = B.say
backward = B.backward
def entries(S, plan, shares):
    q, k, v = A.inputs(1, S, (32, 8), 128, "bf16")
    p = K.Problem(q, k, v, "forward_backward", shares)
    starts = torch.zeros(1, dtype=torch.int32, device="cuda")
    made = {share: KeyBlocks.from_mask(p.random_mask(share), starts, 128, 128) for share in shares}
    return p, made
def forced(call, which):
    def run():
        hbl.pays = lambda r: which == "hopper"
        return call()
    return run
def go(S, shares, which=("hopper", "portable"), plans={"lists": DENSE}):
    p, made = entries(S, DENSE, shares)
    calls = {("dense", w): forced(p.call(), w) for w in which}
    for name, plan in plans.items():
        for share, blocks in made.items():
            for w in which: calls[name, share, w] = forced(p.call(plan, blocks), w)
            calls[name, share, "fwd"] = K.Problem(p.q, p.k, p.v, "forward", shares).call(plan, blocks)
    t = A.measure(calls, 0.5, 3, False)
    for key, x in t.items(): say(S, key, f"{x:.3f} ms", f"{t['dense', key[-1] if key[-1] in which else which[0]] / x:.2f} of dense with the same backward")
def check(S, share, plan):
    from test_backward_gpu import gradients
    p, made = entries(S, plan, [share])
    r = p.request(plan, made[share])._replace(with_lse=True)
    out, lse = choice.choose(r).prepare(r)(r)
    grad = torch.randn_like(out)
    say("refusal", hbl.refusal(r))
    mine = backward(grad, out, lse, r)[:3]; torch.cuda.synchronize()
    again = backward(grad, out, lse, r)[:3]; torch.cuda.synchronize()
    theirs = portable.backward(grad, out, lse, r)
    say(S, share, "err dq dk dv against portable", [f"{B.err(a, b):.1e}" for a, b in zip(mine, theirs)], "same bits", [torch.equal(a, b) for a, b in zip(mine, again)])
def profile(S, share, plan):
    from torch.profiler import profile as P, ProfilerActivity
    p, made = entries(S, plan, [share])
    r = p.request(plan, made[share])._replace(with_lse=True)
    out, lse = choice.choose(r).prepare(r)(r)
    grad = torch.randn_like(out)
    for _ in range(2): backward(grad, out, lse, r); portable.backward(grad, out, lse, r)
    with P(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(5): backward(grad, out, lse, r)
        for _ in range(3): portable.backward(grad, out, lse, r)
        torch.cuda.synchronize()
    for e in prof.key_averages():
        if e.device_time_total / e.count > 5: say("profile lists", S, share, e.key[:50], e.count, f"{e.device_time_total / e.count:.0f} us")
SPARSE = top_n_plan(2, 4, 0, 64)
if MODE == "warm":
    for plan in (DENSE, SPARSE): B.attempt(check, 2048, 0.75, plan)
elif MODE == "time":
    say("imported")
    B.attempt(check, 16384, 0.75, DENSE)
    B.attempt(go, 16384, [0.5, 0.75, 0.9])
    B.attempt(profile, 16384, 0.75, DENSE)
    B.attempt(go, 32768, [0.75], which=("hopper",))
    B.attempt(go, 16384, [0.75], plans={"2:4 lists": SPARSE})
