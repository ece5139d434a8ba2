import sys, os, time
T0 = time.time()
sys.path[:0] = ["bw", "tests/kernels", "tests"]
import pre
import torch
from cases import one_sequence
from modelopt_lite.kernels import choice, hopper_launch, portable, hopper_backward_launch as hbl
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE
from torch.nn.attention import sdpa_kernel, SDPBackend
import torch.nn.functional as F
dev = "cuda"
def say(*a): print(f"[{time.time() - T0:.0f}s]", *a, flush=True)
def plan_of(n): return DENSE if n == "dense" else top_n_plan(*map(int, n.split(":")), 0, 64)
def err(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()
def make(S, plan, heads=(32, 8), batch=1):
    g = torch.Generator(dev).manual_seed(0)
    q, k, v = (torch.randn(S, h, 128, generator=g, device=dev).bfloat16() for h in (heads[0], heads[1], heads[1]))
    grad = torch.randn(S, heads[0], 128, generator=g, device=dev).bfloat16()
    r = one_sequence(q, k, v, plan)
    return r._replace(**{k: getattr(r, k).int() for k in ('starts_q', 'lengths_q', 'starts_k', 'lengths_k')}), grad
def timeit(fns, reps, rounds=3):
    times = {k: [] for k in fns}
    for _ in range(rounds):
        for k, f in fns.items():
            f(); torch.cuda.synchronize(); a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(reps): f()
            b.record(); torch.cuda.synchronize(); times[k].append(a.elapsed_time(b) / reps)
    return {k: sorted(v)[len(v) // 2] for k, v in times.items()}
def case(S, names, with_portable, late=()):
    fns = {}
    r0, grad = make(S, DENSE)
    q, k, v = (x[None].transpose(1, 2).detach().requires_grad_() for x in (r0.q, r0.k, r0.v))
    gg = grad[None].transpose(1, 2)
    def forward():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=r0.softmax_scale)
    o = forward()
    fns["cudnn bwd"] = lambda: torch.autograd.grad(o, (q, k, v), gg, retain_graph=True)
    fns["cudnn f+b"] = lambda: torch.autograd.grad(forward(), (q, k, v), gg)
    theirs = [x[0].transpose(0, 1) for x in fns["cudnn bwd"]()]
    for n in names:
        r, _ = make(S, plan_of(n))
        kernel = choice.choose(r)
        run = kernel.prepare(r)
        out, lse = run(r)
        fns[f"{n} fwd"] = lambda r=r, run=run: run(r)
        fns[f"{n} bwd"] = lambda r=r, out=out, lse=lse: hbl.backward(grad, out, lse, r)
        if with_portable: fns[f"{n} portable"] = lambda r=r, out=out, lse=lse: portable.backward(grad, out, lse, r)
        mine = hbl.backward(grad, out, lse, r)[:3]; torch.cuda.synchronize()
        again = hbl.backward(grad, out, lse, r)[:3]; torch.cuda.synchronize()
        e = [f"{err(a, b):.1e}" for a, b in zip(mine, theirs)] if n == "dense" else [f"{err(a, b):.1e}" for a, b in zip(mine, portable.backward(grad, out, lse, r))] if with_portable else ""
        say(S, n, kernel.name, e, "same bits:", [torch.equal(a, b) for a, b in zip(mine, again)])
    res = timeit(fns, max(2, int(8e9 / (S * S * 10))))
    fl = 10 * S * S * 128 * 32 / 2
    for k_, t in res.items(): say(S, f"{k_:20s} {t:.3f} ms", f"{fl / t / 1e9:.0f} TFLOP/s" if "bwd" in k_ else "")
    for n in names:
        both = res[n + " fwd"] + res[n + " bwd"]
        say(S, n, f"f+b / cudnn: {res['cudnn f+b'] / both:.3f}", f"portable {res['cudnn f+b'] / (res[n + ' fwd'] + res[n + ' portable']):.3f}" if with_portable else "")
def profile(S, n):
    from torch.profiler import profile as P, ProfilerActivity
    r, grad = make(S, plan_of(n)); out, lse = choice.choose(r).prepare(r)(r)
    with P(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(3): hbl.backward(grad, out, lse, r)
        torch.cuda.synchronize()
    for e in p.key_averages(): say(S, n, e.key[:60], e.count, f"{e.device_time_total / e.count:.0f} us")
if sys.argv[1] == "warm":
    for n in sys.argv[2:]:
        t = time.time(); r, grad = make(4096, plan_of(n)); out, lse = choice.choose(r).prepare(r)(r); torch.cuda.synchronize(); say(n, "fwd", f"{time.time() - t:.1f}s"); t = time.time()
        hbl.backward(grad, out, lse, r); torch.cuda.synchronize(); say(n, "bwd", f"{time.time() - t:.1f}s"); t = time.time()
        if n != "4:8": portable.backward(grad, out, lse, r); torch.cuda.synchronize(); say(n, "portable", f"{time.time() - t:.1f}s")
else:
    x = torch.randn(8192, 8192, device=dev).bfloat16(); t = time.time()
    while time.time() - t < 1.0: (x @ x); torch.cuda.synchronize()
    names = ["dense", "2:4", "4:8"]
    case(4096, names, False)
    for n in ("dense", "2:4"): profile(4096, n)
    import runpy
    out = os.path.join(os.environ.get("OUT", "/tmp/out"), "backward"); os.makedirs(out, exist_ok=True)
    for lengths in (["4096", "8192", "16384"], ["32768"]):
        sys.argv = ["attention.py", "--passes", "forward_backward", "--seq-lens", *lengths, "--head-dims", "128", "--heads", "32/8", "--causal", "yes", "--names", "dense", "2:4", "4:8", "--peers", "cudnn", *(["fa2"] if len(lengths) > 1 else []), "--heat", "0.7", "--output", out + "/attention.json"]
        runpy.run_path("benchmarks/attention.py", run_name="__main__")
        say("done", lengths)
        if len(lengths) > 1:
            case(2048, ["dense", "2:4"], True)
            case(1024, ["dense", "2:4"], True)
            profile(16384, "dense")
