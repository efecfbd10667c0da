"""Where the rooms meet: flags, the job, the loop, the report."""
