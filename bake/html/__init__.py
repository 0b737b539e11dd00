"""The report of a bake: one page that needs no network, drawn from the evidence in its folder."""
