import sys, time, torch
from tests.dist.ranks import run_ranks
from tests.invariant.methods import methods
from tests.invariant.steps import Bench, random_pairs, two_models, difference
from tests.invariant.oracle import oracle_step
M = methods()

def work(runtime, names):
    out = {}
    for name in names:
        method = M[name]
        bench = Bench(runtime, method, two_models(torch.float32), lr=0.1)
        rows = random_pairs(method.needs.columns, 8)
        losses = [bench.step(rows, 2)[0] for _ in range(3)]
        w = bench.trainer.engine.weights()
        if w is None: w = {k: v.detach().clone() for k, v in bench.trainer.policy.lm.state_dict().items()}
        out[name] = (losses, w, bench.line["grad_norm"])
    return out

if __name__ == "__main__":
    names = ["dpo", "tdpo", "sppo"]
    names = [n for want in names for n in M if n.split()[0]==want][:1] + [n for n in M if n.startswith("tdpo")][:1]
    print(list(M)[:40], names)
    from accelerate import Accelerator
    from prefopt.engine.runtime import Runtime
    expected = work(Runtime(Accelerator(cpu=True)), names)
    for engine in sys.argv[1:]:
        t=time.time()
        try:
            ranks = run_ranks(work, names, engine=engine, timeout=120)
        except AssertionError as e:
            print(engine, "FAILED", str(e)[-1500:]); continue
        for name in names:
            (l0, w0, n0), (l1, w1, n1) = expected[name], ranks[0][name]
            start = two_models(torch.float32)[0].state_dict()
            gap = max(float((w1[k]-w0[k]).norm()) for k in w0); moved = max(float((w0[k]-start[k]).norm()) for k in w0)
            print(engine, name, [abs(a-b)/abs(a) for a,b in zip(l0,l1)], gap, moved, n0, n1, f"{time.time()-t:.1f}s")
