-- The database of airline_agent.py: the users, reservations and flights that the tools showed in the
-- first 12 of tau-bench's historical trajectories (gpt-4o-airline.json, trial 0). All are made up.
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
CREATE TABLE passengers (
    reservation_id TEXT NOT NULL REFERENCES reservations,
    name TEXT NOT NULL,
    PRIMARY KEY (reservation_id, name)
);
CREATE TABLE legs (
    reservation_id TEXT NOT NULL REFERENCES reservations,
    flight_number TEXT NOT NULL,
    date TEXT NOT NULL,
    PRIMARY KEY (reservation_id, flight_number, date)
);
CREATE TABLE flights (
    flight_number TEXT NOT NULL,
    date TEXT NOT NULL,
    origin TEXT NOT NULL,
    destination TEXT NOT NULL,
    departs TEXT NOT NULL,
    economy_price INTEGER NOT NULL,
    economy_seats INTEGER NOT NULL,
    PRIMARY KEY (flight_number, date)
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

INSERT INTO passengers (reservation_id, name) VALUES
    ('JG7FMM', 'Omar Davis'),
    ('JG7FMM', 'Fatima Patel'),
    ('LQ940Q', 'Omar Davis'),
    ('2FBBAH', 'Omar Davis'),
    ('OI5L9G', 'Sofia Kim'),
    ('OI5L9G', 'Mia Jackson'),
    ('AQLBTL', 'Sofia Kim'),
    ('KA7I60', 'Sofia Kim'),
    ('I57WUD', 'Sofia Kim'),
    ('I57WUD', 'Mia Jackson'),
    ('I57WUD', 'Ava Kim'),
    ('OBUT9V', 'Sofia Kim'),
    ('4BMN53', 'Juan Wilson'),
    ('Q0ZF0J', 'Sofia Kim'),
    ('Q0ZF0J', 'Ethan Patel'),
    ('UM3OG5', 'Omar Rossi'),
    ('UM3OG5', 'Liam Lee'),
    ('5RJ7UH', 'Omar Rossi'),
    ('5RJ7UH', 'Isabella Anderson'),
    ('FQ8APE', 'Ivan Garcia'),
    ('M05KNL', 'Aarav Garcia'),
    ('H9ZU1C', 'James Moore'),
    ('H9ZU1C', 'Ethan Lopez'),
    ('H9ZU1C', 'Amelia Sanchez'),
    ('G72NSF', 'Ivan Muller'),
    ('G72NSF', 'Isabella Moore');

INSERT INTO legs (reservation_id, flight_number, date) VALUES
    ('JG7FMM', 'HAT028', '2024-05-21'),
    ('JG7FMM', 'HAT277', '2024-05-21'),
    ('LQ940Q', 'HAT294', '2024-05-16'),
    ('LQ940Q', 'HAT013', '2024-05-16'),
    ('LQ940Q', 'HAT161', '2024-05-19'),
    ('LQ940Q', 'HAT009', '2024-05-19'),
    ('2FBBAH', 'HAT080', '2024-05-28'),
    ('2FBBAH', 'HAT076', '2024-05-28'),
    ('2FBBAH', 'HAT255', '2024-05-30'),
    ('2FBBAH', 'HAT148', '2024-05-30'),
    ('OI5L9G', 'HAT017', '2024-05-25'),
    ('OI5L9G', 'HAT277', '2024-05-25'),
    ('AQLBTL', 'HAT249', '2024-05-19'),
    ('AQLBTL', 'HAT273', '2024-05-19'),
    ('AQLBTL', 'HAT228', '2024-05-26'),
    ('AQLBTL', 'HAT041', '2024-05-27'),
    ('KA7I60', 'HAT160', '2024-05-26'),
    ('KA7I60', 'HAT167', '2024-05-26'),
    ('KA7I60', 'HAT191', '2024-05-28'),
    ('KA7I60', 'HAT262', '2024-05-28'),
    ('I57WUD', 'HAT128', '2024-05-18'),
    ('I57WUD', 'HAT297', '2024-05-18'),
    ('I57WUD', 'HAT067', '2024-05-22'),
    ('I57WUD', 'HAT221', '2024-05-23'),
    ('OBUT9V', 'HAT078', '2024-05-27'),
    ('OBUT9V', 'HAT118', '2024-05-27'),
    ('OBUT9V', 'HAT084', '2024-05-28'),
    ('OBUT9V', 'HAT266', '2024-05-28'),
    ('4BMN53', 'HAT201', '2024-05-22'),
    ('4BMN53', 'HAT173', '2024-05-22'),
    ('Q0ZF0J', 'HAT201', '2024-05-28'),
    ('Q0ZF0J', 'HAT181', '2024-05-28'),
    ('Q0ZF0J', 'HAT161', '2024-05-30'),
    ('Q0ZF0J', 'HAT066', '2024-05-30'),
    ('UM3OG5', 'HAT113', '2024-05-26'),
    ('UM3OG5', 'HAT282', '2024-05-28'),
    ('UM3OG5', 'HAT239', '2024-05-28'),
    ('5RJ7UH', 'HAT034', '2024-05-26'),
    ('5RJ7UH', 'HAT163', '2024-05-29'),
    ('FQ8APE', 'HAT056', '2024-05-25'),
    ('FQ8APE', 'HAT138', '2024-05-25'),
    ('M05KNL', 'HAT227', '2024-05-23'),
    ('M05KNL', 'HAT139', '2024-05-23'),
    ('H9ZU1C', 'HAT192', '2024-05-24'),
    ('H9ZU1C', 'HAT166', '2024-05-25'),
    ('G72NSF', 'HAT097', '2024-05-17'),
    ('G72NSF', 'HAT251', '2024-05-17');

INSERT INTO flights (flight_number, date, origin, destination, departs, economy_price, economy_seats) VALUES
    ('HAT069', '2024-05-20', 'JFK', 'SEA', '06:00', 121, 12),
    ('HAT083', '2024-05-20', 'JFK', 'SEA', '01:00', 100, 7),
    ('HAT057', '2024-05-20', 'JFK', 'ATL', '07:00', 141, 3),
    ('HAT039', '2024-05-20', 'ATL', 'SEA', '22:00', 103, 10),
    ('HAT136', '2024-05-20', 'JFK', 'ATL', '19:00', 152, 14),
    ('HAT218', '2024-05-20', 'JFK', 'ATL', '18:00', 158, 1),
    ('HAT268', '2024-05-20', 'JFK', 'ATL', '07:00', 101, 19),
    ('HAT084', '2024-05-27', 'DEN', 'LAS', '04:00', 112, 20),
    ('HAT175', '2024-05-27', 'LAS', 'IAH', '17:00', 170, 16),
    ('HAT266', '2024-05-27', 'LAS', 'IAH', '13:00', 130, 5),
    ('HAT229', '2024-05-27', 'DEN', 'LAS', '11:00', 109, 0),
    ('HAT290', '2024-05-27', 'DEN', 'LAS', '14:00', 142, 12),
    ('HAT110', '2024-05-24', 'ATL', 'LGA', '14:00', 105, 9),
    ('HAT132', '2024-05-24', 'LGA', 'PHL', '17:00', 190, 8),
    ('HAT172', '2024-05-24', 'LGA', 'PHL', '23:00', 102, 2),
    ('HAT206', '2024-05-24', 'LGA', 'PHL', '18:00', 145, 19),
    ('HAT264', '2024-05-24', 'LGA', 'PHL', '23:00', 156, 17),
    ('HAT164', '2024-05-24', 'ATL', 'LGA', '11:00', 145, 15),
    ('HAT227', '2024-05-24', 'ATL', 'ORD', '11:00', 112, 5),
    ('HAT139', '2024-05-24', 'ORD', 'PHL', '17:00', 104, 10),
    ('HAT271', '2024-05-24', 'ORD', 'PHL', '19:00', 138, 14),
    ('HAT004', '2024-05-24', 'ATL', 'DFW', '14:00', 122, 2),
    ('HAT063', '2024-05-24', 'DFW', 'EWR', '18:00', 186, 4),
    ('HAT142', '2024-05-24', 'DFW', 'EWR', '18:00', 121, 14),
    ('HAT059', '2024-05-24', 'ATL', 'DFW', '07:00', 115, 1),
    ('HAT252', '2024-05-24', 'ATL', 'DFW', '01:00', 129, 13),
    ('HAT297', '2024-05-24', 'ATL', 'DFW', '12:00', 167, 13),
    ('HAT023', '2024-05-20', 'JFK', 'SFO', '14:00', 191, 13),
    ('HAT021', '2024-05-25', 'SEA', 'JFK', '19:00', 198, 14),
    ('HAT089', '2024-05-25', 'SEA', 'JFK', '10:00', 153, 2),
    ('HAT100', '2024-05-25', 'SEA', 'JFK', '13:00', 176, 12),
    ('HAT276', '2024-05-25', 'SEA', 'JFK', '18:00', 162, 20);
