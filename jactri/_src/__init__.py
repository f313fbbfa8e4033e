"""The engine. Its folders, lowest first: base, device, maps, rules, read, plan, run, prologue; then meet, second and
parameters, side by side; calls, compile, tools. Each imports what is below it alone."""
