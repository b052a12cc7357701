"""One model over several ranks: sharded, split within its layers, or cut into stages.

`layout` says which ranks hold which part and who gets which data; `sharding`,
`tensor` and `stages` make one; `pieces` puts a model together again.
"""
