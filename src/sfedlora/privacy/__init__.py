"""Differential privacy with the client as its unit: clipping, noise, and what they amount to.

`mechanism` clips changes and adds noise, `noise` draws it, `accounting` states epsilon. What a server or a site does
with them is in `federation`.
"""
