"""The search: trials of a recipe's open numbers on hooks, under its guard."""
