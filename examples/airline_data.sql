-- The database of airline_agent.py: the users and reservations that the tools showed in the first 12
-- of tau-bench's historical trajectories (gpt-4o-airline.json, trial 0). All are made up.
--
-- MIT License
--
-- Copyright (c) 2024 Sierra
--
-- Permission is hereby granted, free of charge, to any person obtaining a copy
-- of this software and associated documentation files (the "Software"), to deal
-- in the Software without restriction, including without limitation the rights
-- to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
-- copies of the Software, and to permit persons to whom the Software is
-- furnished to do so, subject to the following conditions:
--
-- The above copyright notice and this permission notice shall be included in all
-- copies or substantial portions of the Software.
--
-- THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
-- IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
-- FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
-- AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
-- LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
-- OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
-- SOFTWARE.

CREATE TABLE users (
    user_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    membership TEXT NOT NULL
);
CREATE TABLE reservations (
    reservation_id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES users,
    origin TEXT NOT NULL,
    destination TEXT NOT NULL,
    cabin TEXT NOT NULL,
    bags INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'active'
);

INSERT INTO users (user_id, name, membership) VALUES
    ('mia_li_3668', 'Mia Li', 'gold'),
    ('omar_davis_3817', 'Omar Davis', 'regular'),
    ('sofia_kim_7287', 'Sofia Kim', 'silver'),
    ('omar_rossi_1241', 'Omar Rossi', 'gold'),
    ('aarav_garcia_1177', 'Aarav Garcia', 'gold'),
    ('mia_kim_4397', 'Mia Kim', 'silver'),
    ('ivan_muller_7015', 'Ivan Muller', 'gold');

INSERT INTO reservations (reservation_id, user_id, origin, destination, cabin, bags) VALUES
    ('JG7FMM', 'omar_davis_3817', 'MCO', 'CLT', 'business', 3),
    ('LQ940Q', 'omar_davis_3817', 'SFO', 'MCO', 'economy', 1),
    ('2FBBAH', 'omar_davis_3817', 'DEN', 'DEN', 'business', 0),
    ('OI5L9G', 'sofia_kim_7287', 'MCO', 'CLT', 'business', 2),
    ('AQLBTL', 'sofia_kim_7287', 'LAX', 'LAX', 'economy', 0),
    ('KA7I60', 'sofia_kim_7287', 'DEN', 'DTW', 'economy', 1),
    ('I57WUD', 'sofia_kim_7287', 'DFW', 'DFW', 'business', 4),
    ('OBUT9V', 'sofia_kim_7287', 'IAH', 'DEN', 'economy', 1),
    ('4BMN53', 'sofia_kim_7287', 'LGA', 'LAS', 'economy', 1),
    ('Q0ZF0J', 'sofia_kim_7287', 'LGA', 'MCO', 'business', 3),
    ('UM3OG5', 'omar_rossi_1241', 'SEA', 'DFW', 'economy', 0),
    ('5RJ7UH', 'omar_rossi_1241', 'LAX', 'SFO', 'economy', 1),
    ('FQ8APE', 'omar_rossi_1241', 'EWR', 'ORD', 'basic economy', 0),
    ('M05KNL', 'aarav_garcia_1177', 'ATL', 'PHL', 'business', 0),
    ('H9ZU1C', 'mia_kim_4397', 'MIA', 'IAH', 'economy', 0),
    ('G72NSF', 'ivan_muller_7015', 'DTW', 'SEA', 'economy', 2);
