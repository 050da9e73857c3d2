"""Tables for people, drawn with rich. Memory in GiB, time in ms or s, and GB (10^9) only where the label says so.

`text` is what they are made of, `plans` what is planned, `results` what was run; import the one that is needed.
"""
