"""The only room that knows pytest: options, hooks, markers, fixtures, terminal, xdist."""
