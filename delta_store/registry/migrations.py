"""The steps that lead from an empty SQLite file to today's tables; a step that was released is never edited."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE versions (
            variant TEXT NOT NULL,
            number INTEGER NOT NULL,
            created REAL NOT NULL,
            digest TEXT NOT NULL,
            receipt TEXT NOT NULL,
            PRIMARY KEY (variant, number),
            UNIQUE (variant, digest)
        )""",
        """CREATE TABLE variants (
            variant TEXT PRIMARY KEY,
            number INTEGER NOT NULL,
            FOREIGN KEY (variant, number) REFERENCES versions (variant, number)
        )""",
    ),
    (
        "ALTER TABLE variants ADD COLUMN canary INTEGER",
        "ALTER TABLE variants ADD COLUMN share REAL NOT NULL DEFAULT 0",
    ),
)
