"""One module a command, each with one public function of its name. They meet in folders on disk.

`workflows` and `compare` call several of them."""
