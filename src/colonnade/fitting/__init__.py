"""Which layers lose how much, and the bundles that come of it: sensitivities, layer times, a knapsack, a frontier."""
