"""How Toyland's networks are trained, from nothing, in resumable stages."""
