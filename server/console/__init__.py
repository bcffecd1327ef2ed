"""The console: a web page that shows the variants, takes uploads, follows jobs, and asks several models at once."""
