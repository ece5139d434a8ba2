"""warm|time: forward+backward against cuDNN and the portable backward, in turns; variants of the kernel by patches."""
import os, sys, time, importlib, pathlib
T0 = time.time()
sys.path[:0] = ["bw", "benchmarks", "tests/kernels", "tests"]
import torch
import attention as A
from modelopt_lite.kernels import choice, portable, hopper_backward_launch as hbl, hopper_backward as hb
dev = "cuda"
KERNEL = hbl.attention_backward_hopper
PATCHES = {
    "noturn": [("@others bra again;", "")],
    "noadd": [("@others bra again;", ""), ("tma.async_copy_shared_to_global(descriptor, [line, 0], memory.index(w))", "pass"),
              ("add_to_global(descriptor, [line, 0], memory.index(w))", "pass")],
    "noreduce": [("@others bra again;", ""), ("                                if rank == 0:", "                                if rank >= 0:")],
}
def say(*a): print(f"[{time.time() - T0:.0f}s]", *a, flush=True)
def kernel_of(variant):
    if not variant: return KERNEL
    name = f"hopper_backward_{variant}"
    path = pathlib.Path(f"modelopt_lite/kernels/{name}.py")
    if not path.exists():
        text = pathlib.Path("modelopt_lite/kernels/hopper_backward.py").read_text()
        for old, new in PATCHES[variant]:
            assert old in text, old
            text = text.replace(old, new)
        tmp = path.with_suffix(f".{os.getpid()}"); tmp.write_text(text); tmp.rename(path)
    return importlib.import_module(f"modelopt_lite.kernels.{name}").attention_backward_hopper
_made = {}
def backward(grad, out, lse, r):
    key = (id(r), hbl.attention_backward_hopper)
    if key not in _made: _made[key] = (hbl.prepare(grad, r), r)
    return _made[key][0](grad, out, lse, r)
def err(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()
def training(q, k, v, name, which):
    call = A.own_training_call(q, k, v, True, name)
    def run():
        hbl.pays = lambda r: which == "hopper"
        return call()
    return run
def warm(spec):
    name, variant, dim = (spec.split(",") + ["", ""])[:3]
    dim = int(dim or 128)
    hbl.attention_backward_hopper = kernel_of(variant)
    q, k, v = A.inputs(1, 4096, (32, 8), dim, "bf16")
    t = time.time()
    for which in ("hopper",) if variant else ("hopper", "portable"):
        training(q, k, v, name, which)(); torch.cuda.synchronize(); say("warm", spec, which, f"{time.time() - t:.1f}s")
def parts(S, name):
    """What the backward takes and gets, outside autograd."""
    q, k, v = A.inputs(1, S, (32, 8), 128, "bf16")
    r = A.request_of(q, k, v, True, name)._replace(with_lse=True)
    out, lse = choice.choose(r).prepare(r)(r)
    return r, torch.randn_like(out), out, lse
def check(S, name):
    r, grad, out, lse = parts(S, name)
    mine = backward(grad, out, lse, r)[:3]; torch.cuda.synchronize()
    again = backward(grad, out, lse, r)[:3]; torch.cuda.synchronize()
    theirs = portable.backward(grad, out, lse, r)
    say(S, name, "err dq dk dv against portable", [f"{err(a, b):.1e}" for a, b in zip(mine, theirs)], "same bits", [torch.equal(a, b) for a, b in zip(mine, again)])
def profile(S, name):
    from torch.profiler import profile as P, ProfilerActivity
    r, grad, out, lse = parts(S, name)
    run = choice.choose(r).prepare(r)
    for _ in range(2): run(r); backward(grad, out, lse, r); portable.backward(grad, out, lse, r)
    with P(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5): run(r)
        for _ in range(5): backward(grad, out, lse, r)
        for _ in range(3): portable.backward(grad, out, lse, r)
        torch.cuda.synchronize()
    for e in p.key_averages(): say("profile", S, name, e.key[:50], e.count, f"{e.device_time_total / e.count:.0f} us")
def turns(S, names, which=("hopper", "portable"), heat=0.5, dim=128):
    q, k, v = A.inputs(1, S, (32, 8), dim, "bf16")
    calls = {"cudnn": A.peer_call("cudnn", q, k, v, True, "forward_backward")}
    for n in names:
        for w in which: calls[n, w] = training(q, k, v, n, w)
    for n in names: calls[n, "fwd"] = A.own_call(A.request_of(q, k, v, True, n), "sparse_cores" if n == "2:4" else "hopper")
    calls["cudnn", "fwd"] = A.peer_call("cudnn", q, k, v, True, "forward")
    t = A.measure(calls, heat, 3, False)
    say(S, dim, {str(k_): round(x, 4) for k_, x in t.items()})
    for n in names: say(S, dim, n, "ratio to cudnn", {w: round(t["cudnn"] / t[n, w], 3) for w in which}, "forward", round(t["cudnn", "fwd"] / t[n, "fwd"], 3), "backward", {w: round((t["cudnn"] - t["cudnn", "fwd"]) / (t[n, w] - t[n, "fwd"]), 3) for w in which})
def variants(S, specs):
    fns = {}
    made = {n: parts(S, n) for n in {s.split(",")[0] for s in specs}}
    for s in specs:
        n, variant = (s.split(",") + [""])[:2]
        r, grad, out, lse = made[n]
        def go(kernel=kernel_of(variant), a=(grad, out, lse, r)):
            hbl.attention_backward_hopper = kernel
            return backward(*a)
        fns[s] = go
    t = A.measure(fns, 0.3, 3, False)
    hbl.attention_backward_hopper = KERNEL
    fl = 10 * S * S * 128 * 32 / 2
    for s, x in t.items(): say("variant", S, s, f"{x:.3f} ms {fl / x / 1e9:.0f} TFLOP/s")
def attempt(f, *a, **k):
    try: f(*a, **k)
    except Exception as e: say("FAILED", f.__name__, a, repr(e)[:400])
if __name__ == "__main__":
    if sys.argv[1] == "warm":
        for s in sys.argv[2:]: attempt(warm, s)
    elif sys.argv[1] == "final":
        say("imported")
        for S in (2048, 1024): attempt(turns, S, ["dense", "2:4", "4:8"], heat=0.2)
        for S in (4096, 2048, 8192): attempt(turns, S, ["dense", "2:4"], heat=0.2, dim=64)
        attempt(turns, 4096, ["dense", "2:4", "4:8"], heat=0.2)
        attempt(turns, 512, ["dense", "2:4"], heat=0.2)
        import lists10 as L
        attempt(L.go, 16384, [0.75])
    else:
        say("imported", torch.cuda.get_device_name(), torch.__version__)
        names = ["dense", "2:4", "4:8"]
        for n in ("dense", "2:4"): attempt(check, 4096, n)
        attempt(turns, 16384, names)
        attempt(variants, 16384, ["dense", "dense,noturn", "dense,noadd", "dense,noreduce", "2:4", "4:8"])
        attempt(turns, 4096, names)
        for S in (4096, 16384):
            for n in names[:2]: attempt(profile, S, n)
        attempt(turns, 8192, names)
        attempt(variants, 4096, ["dense", "dense,noturn", "dense,noadd", "dense,noreduce"])
        import lists10 as L
        attempt(L.check, 16384, 0.75, L.DENSE)
        attempt(L.go, 16384, [0.75, 0.9])
        attempt(turns, 16384, ["dense", "2:4"], dim=64)
        attempt(turns, 4096, ["dense", "2:4"], dim=64)
        attempt(turns, 32768, names, which=("hopper",))
        attempt(turns, 2048, names)
        attempt(turns, 1024, names)
