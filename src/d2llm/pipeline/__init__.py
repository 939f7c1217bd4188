"""One file is one verb is one public function that a script can call."""
