"""Tells what a training step needs and how long it takes, on hardware that is not at hand.

chips, topology              the hardware
compiled                     the program: the run's own step, compiled for that hardware
hlo, collectives, work       what is read off it; products and traffic count FLOPs and bytes
flops, memory                our own formulas and arithmetic
links, roofline              the time
planner, sweep, report       the answers
"""
