"""An engine held against its checkpoint: layer by layer, case by case, constant by constant."""
