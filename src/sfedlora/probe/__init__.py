"""A stability check before the long run: does the law of the scaling hold for this model and data, and what follows.

    for event in probe_events(RunConfig.load("run.yaml"), Plan()): ...

Short federations (two rounds, one SGD step each) on a slice of the data, over a small grid of ranks and numbers of
clients, all on one loaded base model, give the log-log slopes of |grad B| at the first step of round 2 and of gain for
every scaling; a ladder of learning rates gives where training diverges. `verdict` says in words what that means.

Not here: the long comparison itself (`sfedlora compare`).
"""

from __future__ import annotations

from sfedlora.probe.figure import draw_probe as draw_probe
from sfedlora.probe.measure import Measurements as Measurements
from sfedlora.probe.measure import Plan as Plan
from sfedlora.probe.measure import Progress as Progress
from sfedlora.probe.measure import probe_events as probe_events
from sfedlora.probe.verdict import Verdict as Verdict
from sfedlora.probe.verdict import judge as judge

__all__ = ["Measurements", "Plan", "Progress", "Verdict", "draw_probe", "judge", "probe_events"]
