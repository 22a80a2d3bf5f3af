"""From a training program to what to change in it: a plan of launches, a decision tree, a folder to read.

The plan runs the program in several ways (one step, more steps, other backend, each branch alone, static
graph, single process, checkpointing layer by layer); the tree reads what came of them. Importing this package
imports no torch.
"""
